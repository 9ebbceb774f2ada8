"""Shapes of models, what is measured, and how a call is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tune_samples import SMALL, write

from pykvcache import launch_table, ops
from pykvcache.bench.timing import WrongResult
from pykvcache.bench.tune import measure
from pykvcache.bench.tune.explain import CallSpec
from pykvcache.bench.tune.measure import Bench, fit_lengths, launches_for, table_of
from pykvcache.bench.tune.search import (
    DEFAULT,
    Candidate,
    Launch,
)
from pykvcache.bench.tune.shapes import load_shape


def test_shapes_of_models(tmp_path: Path) -> None:
    shape = load_shape("llama-3.1-8b", "bf16")
    assert (shape.layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (32, 32, 8, 128)
    assert shape.token_bytes == 4096 and shape.config().token_bytes == 32 * 4096
    fields = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    fields |= {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    write(tmp_path / "config.json", fields)
    found = load_shape(str(tmp_path), "fp32")
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (32, 8, 128)
    assert found.parameters == pytest.approx(7.5e9, rel=0.03)  # embeddings counted once
    with pytest.raises(ValueError, match="latents"):
        load_shape("deepseek-v3", "bf16")
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'int8'"):
        load_shape("gpt2", "int8")


def test_weights_of_experts(tmp_path: Path) -> None:
    """As the packaged table and the models' own cards have them."""
    qwen = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    qwen |= {"head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "num_experts": 128}
    qwen |= {"moe_intermediate_size": 768, "vocab_size": 151936}
    scout = {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
    scout |= {"hidden_size": 5120, "intermediate_size": 8192, "num_local_experts": 16}
    scout |= {"head_dim": 128, "intermediate_size_mlp": 16384, "vocab_size": 202048}
    maverick = scout | {"num_local_experts": 128, "interleave_moe_layer_step": 2}
    mixtral = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    mixtral |= {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8}
    known = load_shape("qwen3-30b-a3b", "bf16").parameters
    for fields, billions in ((qwen, known / 1e9), (scout, 107), (maverick, 401), (mixtral, 46.7)):
        path = write(tmp_path / "config.json", fields)
        assert load_shape(str(path), "bf16").parameters == pytest.approx(1e9 * billions, rel=0.04)
    dense = write(tmp_path / "config.json", qwen | {"mlp_only_layers": list(range(48))})
    assert load_shape(str(dense), "bf16").parameters < 4e9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 4}, "hidden_size must be at least num_attention_heads, got 4 and 8"),
        ({"kv_lora_rank": "x"}, "kv_lora_rank must be a positive integer, got 'x'"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": None}, "has no qk_rope_head_dim"),
        ({"text_config": "x"}, "text_config must be an object, got 'x'"),
        ({"intermediate_size": [1, 2]}, r"intermediate_size must be a positive integer, got \[1"),
        ({"vocab_size": "x"}, "vocab_size must be a positive integer, got 'x'"),
        ({"head_dim": 64, "hidden_size": "2048"}, "hidden_size must be a positive integer"),
    ],
)
def test_broken_configs_are_one_line(tmp_path: Path, fields: dict, message: str) -> None:
    whole = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}
    whole |= {"intermediate_size": 64, "vocab_size": None}
    assert load_shape(str(write(tmp_path / "config.json", whole)), "bf16").parameters
    with pytest.raises(ValueError, match=message):
        load_shape(str(write(tmp_path / "config.json", whole | fields)), "bf16")


def test_lengths_are_spread_evenly() -> None:
    assert fit_lengths([10, 20, 30, 40], 1000, 1000, 1) == [10, 20, 30, 40]
    chosen = fit_lengths(list(range(1, 101)), 200, 200, 1)
    assert sum(chosen) <= 200 and sum(chosen) / len(chosen) == pytest.approx(50, rel=0.1)
    assert fit_lengths([5000], 200, 200, 1) == [200]
    assert len(fit_lengths([10] * 50, 1000, 20, 256)) == 20


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(measure, "COLD_BYTES", 2**21)
    monkeypatch.setattr(measure, "CALL_BYTES", 2**18)
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 1e-4)
    return Bench(SMALL, [50, 100, 150], 64)


def test_bench_checks_before_it_times(small_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Candidate(size, Launch(32, 2)) for size in (1, 16, 64)]
    small_bench.check(candidates, (0, 128))
    right = ops.paged_attention

    def wrong(*args, backend, **kwargs):
        out, lse = right(*args, backend=backend, **kwargs)
        return (out * 1.01 if backend == "cpu" else out), lse

    monkeypatch.setattr(ops, "paged_attention", wrong)
    with pytest.raises(WrongResult, match=r"block_size=1, .* is off by"):
        small_bench.check(candidates)


def test_bench_rotates_over_the_storage(small_bench: Bench) -> None:
    assert small_bench.decode(Candidate(16)) > 0
    call = small_bench._calls["decode", 16]
    used = call.tables[call.tables >= 0]
    assert len(used) == len(used.unique()) > 0.7 * call.caches[0].shape[0]
    assert call.caches[0].shape[1:] == (2, 16, 16)
    assert small_bench.prefill(16, 128) > 0


def test_tables_of_launches() -> None:
    shape = load_shape("llama-3.1-8b", "bf16")
    where = {"dim": 128, "bytes": 2}
    cpu = table_of(shape, Launch(32, 2, 4), 256, "cpu")
    assert cpu["cpu"]["decode"] == [where | {"tile": 32, "stages": 2, "splits": 4}]
    assert cpu["cpu"]["prefill"] == [where | {"rows": 256}]
    assert table_of(shape, DEFAULT, 0, "cpu") == {}
    gpu = table_of(shape, Launch(32, 3, 2, 8), 0, "sm_90")
    entry = {"dim": 128, "tile": 32, "stages": 3, "warps": 8}
    assert gpu == {"sm_90": {"decode": [entry], "programs_per_sm": 2}}
    for table in (cpu, gpu):
        launch_table.check_table(table)
    for device, threads in (("cpu", 1), ("cpu", 2), ("cuda", 1)):
        grid = launches_for(torch.device(device), threads)
        assert grid[0] == DEFAULT and len(set(grid)) == len(grid)


def test_work_of_a_call() -> None:
    spec = CallSpec.parse("B=2,L=100,HQ=8,HKV=2,D=64,block_size=16,dtype=fp32,q=10")
    assert spec.flops == 4 * 2 * sum(range(91, 101)) * 8 * 64
    assert spec.bytes == 2 * 2 * 100 * 2 * 64 * 4 + 2 * 2 * 10 * 8 * 64 * 4 + 4 * 2 * 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B=1", "explain needs L, HQ, HKV, D"),
        ("L=x", "L must be a positive integer, got 'x'"),
        ("K=1", "explain knows B, L, .*; got 'K=1'"),
        ("L=1,HQ=3,HKV=2,D=8", "HQ must be a multiple of HKV, got 3 and 2"),
        ("L=1,HQ=2,HKV=2,D=600", "D must be 576 at most, got 600"),
        ("L=1,HQ=2,HKV=2,D=8,q=2", "q must be L at most, got 2 and 1"),
        ("L=10,HQ=2,HKV=2,D=8,L=20", "L is given twice"),
        ("L=1,HQ=2,HKV=2,D=8,dtype=int4", "dtype must be one of .*, got 'int4'"),
    ],
)
def test_calls_that_cannot_be_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallSpec.parse(text)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_a_cycle_reads_enough_to_be_cold(
    monkeypatch: pytest.MonkeyPatch, block_size: int, phase: str
) -> None:
    monkeypatch.setattr(measure, "COLD_BYTES", 2**22)
    bench = Bench(SMALL, [90] * 20, 64, block_size=256)
    call = bench._call(phase, block_size)
    read = len(call.tables) * call.cached_tokens * SMALL.token_bytes
    assert read > 0.8 * 2**22
    assert bench.storage.nbytes <= 2**22 * 256 / 64


def test_what_rows_make_of_a_prompt() -> None:
    """A tile never holds more queries than the prompt has."""
    bench = Bench(SMALL, [90], 300)
    found = {rows: bench.prefill_items(16, rows) for rows in (0, 32, 64, 4096)}
    assert found[32][0] == 16 and found[64][0] == 32 and found[4096][0] == 300
    assert found[32][1] > found[64][1] > found[4096][1]
