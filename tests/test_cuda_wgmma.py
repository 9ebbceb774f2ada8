"""Prefill with wgmma (PYKVCACHE_CUDA_PREFILL=wgmma): the case table, prompts of many tiles, which
calls it takes, and the models of Hopper's instructions that run it without a GPU.

On a Hopper GPU the same tests run on the GPU; other GPUs have no such kernel.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuda_host import build
from op_cases import BF16, CASES, F16, F32, Case
from op_cases import build as build_case
from op_oracle import assert_as_good_as_dense

from pykvcache import operators, ops

EMULATED = operators.LOADERS["cuda"] is build.load
if ops.backends()["cuda"] != "ready":
    pytest.skip(ops.backends()["cuda"], allow_module_level=True)
if not EMULATED and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

FP8 = torch.float8_e4m3fn
TABLE = [case for case in CASES if case.dtype in (F16, BF16) and not case.latent]
MANY = ((300, 300), (5, 700), (64, 400), (1, 33), (40, 1000))  # whole prompts, and chunks of some
LONG = [
    Case("bf16", MANY, dtype=BF16),
    Case("dim-128", MANY, head_dim=128, dtype=BF16),
    Case("dim-128-fp16", MANY, head_dim=128, dtype=F16),
    Case("dim-80", MANY, head_dim=80, dtype=BF16),
    Case("dim-40-72", MANY, head_dim=40, v_head_dim=72, dtype=BF16),
    Case("dim-256", ((200, 200), (70, 300)), head_dim=256, dtype=BF16),
    Case("group-1", MANY, num_heads=2, dtype=BF16),
    Case("group-3", MANY, num_heads=6, dtype=F16),
    Case("group-7", MANY, num_heads=14, dtype=BF16, spread=3.0),
    Case("group-16", ((33, 500),), num_heads=16, num_kv_heads=1, head_dim=128, dtype=BF16),
    Case("not-causal", MANY, causal=False, dtype=BF16),
    Case("window", MANY, window=100, head_dim=128, dtype=BF16),
    Case("window-holes", ((40, 700),), window=150, holes=tuple((0, i) for i in range(30)),
         dtype=BF16),
    Case("chunk", MANY, chunk=192, dtype=BF16),
    Case("softcap", MANY, softcap=5.0, spread=2.0, dtype=BF16),
    Case("sinks", MANY, sinks=True, dtype=F16),
    Case("alibi", MANY, alibi=True, dtype=BF16),
    Case("holes", MANY, holes=((1, 3), (1, 4), (2, 0), (4, 62)), dtype=BF16),
    Case("padded", ((200, 150), (200, 0), (200, 200)), dtype=BF16),
    Case("strided-q-nhd", MANY, strided_q=True, layout="NHD", head_dim=128, dtype=BF16),
    Case("scale-head", MANY, scales="head", dtype=BF16),
    Case("latent", ((50, 200),), head_dim=192, v_head_dim=128, latent=True, num_heads=8,
         num_kv_heads=1, dtype=BF16),
    *(
        Case(f"block-{size}", MANY, block_size=size, dtype=BF16)
        for size in (1, 3, 8, 24, 32, 48, 128, 256, 528)
    ),
    Case("block-2-dim-128-holes", MANY, block_size=2, head_dim=128, dtype=BF16,
         holes=((0, 149), (1, 3), (1, 4), (2, 0), (4, 62))),
    Case("block-5-window-nhd", MANY, block_size=5, head_dim=96, window=99, layout="NHD", dtype=F16),
    Case("block-7-dim-256", ((200, 200), (70, 300)), block_size=7, head_dim=256, dtype=BF16),
]  # fmt: skip
ELSEWHERE = [
    Case("float8", MANY, cache_dtype=FP8, dtype=BF16),
    Case("scale-slot", MANY, scales="slot", cache_dtype=FP8, dtype=BF16),
    Case("bias", ((100, 300),), bias="float", dtype=BF16),
    Case("float32", MANY, dtype=F32),
    Case("decode", ((1, 300), (2, 200)), dtype=BF16),
]


@pytest.fixture(autouse=True)
def _wgmma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is chosen, and an output element that nobody writes is NaN."""
    monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "wgmma")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if EMULATED:
        build.control().kv_emulation_set_late_boxes(True)


def check(case: Case) -> bool:
    """Whether the wgmma kernel took a part in a right result; on a GPU that is not known."""
    data = build_case(case)
    before = build.control().kv_emulation_warpgroup_products() if EMULATED else -1
    out, lse = ops.paged_attention(*data.args, **data.kwargs, backend="cuda")
    assert_as_good_as_dense(case, data, out, lse)
    return not EMULATED or build.control().kv_emulation_warpgroup_products() > before


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_case(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_many_tiles(case: Case, late: bool) -> None:
    """Boxes arrive as late or as early as they may."""
    if EMULATED:
        build.control().kv_emulation_set_late_boxes(late)
    elif late:
        pytest.skip("the GPU decides when")
    assert check(case)


@pytest.mark.parametrize("case", ELSEWHERE, ids=str)
def test_others_take_the_rest(case: Case) -> None:
    took = check(case)
    assert took != EMULATED


@pytest.mark.parametrize("case", [LONG[1], LONG[7]], ids=str)
def test_rows_do_not_depend_on_the_batch(case: Case) -> None:
    data = build_case(case)
    q, k_cache, v_cache, table, lengths, starts, _ = data.args
    how = {**data.kwargs, "deterministic": True, "backend": "cuda"}
    out, lse = ops.paged_attention(*data.args, **how)
    for row in range(len(case.rows)):
        begin, end = int(starts[row]), int(starts[row + 1])
        own = (table[row : row + 1], lengths[row : row + 1])
        one = torch.tensor([0, end - begin], dtype=torch.int32)
        got = ops.paged_attention(q[begin:end], k_cache, v_cache, *own, one, end - begin, **how)
        assert torch.equal(got[0], out[begin:end]) and torch.equal(got[1], lse[begin:end])


def test_it_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "mma"):
        monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", value)
        assert check(LONG[0]) == (not EMULATED)
    monkeypatch.delenv("PYKVCACHE_CUDA_PREFILL")
    assert check(LONG[0]) == (not EMULATED)
    monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "fast")
    with pytest.raises(Exception, match="must be mma or wgmma, got fast"):
        check(LONG[0])


def test_benchmarks_time_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from pykvcache.bench import cases, kernels, tensors

    monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "mma")
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**16)
    timed = cases.Case("prefill", cases.Heads("call", 4, 2, 64), BF16, 1, 150)
    device = "cpu" if EMULATED else "cuda"
    workload = kernels.Workload(timed, [16], ["cuda"], device, wgmma=True)
    assert list(workload.contenders)[-2:] == ["paged 16", "paged 16 wgmma"]
    workload.check()
    if EMULATED:
        counts = [build.control().kv_emulation_warpgroup_products()]
        for name in ("paged 16", "paged 16 wgmma"):
            workload.contenders[name](0)
            counts.append(build.control().kv_emulation_warpgroup_products())
        assert counts[0] == counts[1] < counts[2]
    assert os.environ["PYKVCACHE_CUDA_PREFILL"] == "mma"


@pytest.mark.skipif(EMULATED, reason="needs a GPU")
def test_the_gpu_runs_the_kernel() -> None:
    with torch.profiler.profile() as profile:
        check(replace(LONG[1], rows=((4096, 4096), (1000, 9000))))
    assert any("wgmma_kernel" in event.name for event in profile.events())


@pytest.mark.skipif(EMULATED, reason="needs a GPU")
def test_a_captured_call_sees_new_lengths_and_values() -> None:
    """The tensor maps are parameters of the captured launch; everything else is read on the GPU."""
    case = replace(LONG[1], rows=((64, 700), (40, 300)))
    data = build_case(case)
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in data.args]
    how = {"scale": data.kwargs["scale"], "backend": "cuda"}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.paged_attention(*args, **how)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.paged_attention(*args, **how)
    for lengths in ((700, 300), (650, 290), (64, 41)):
        args[0].copy_(torch.randn_like(args[0]))
        args[4].copy_(torch.tensor(lengths))
        graph.replay()
        expected, _ = ops.paged_attention(
            *(x.cpu() if isinstance(x, torch.Tensor) else x for x in args),
            scale=how["scale"], backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(out.cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not EMULATED, reason="on a GPU nothing is modelled")
def test_models_of_the_instructions() -> None:
    """Products of boxes, wrong descriptors, phases of barriers, maps that a driver refuses."""
    done = subprocess.run([build.hopper_models()], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("right") == 22
