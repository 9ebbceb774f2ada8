"""The benchmark of `generate`: its workloads, its variants, and no figure of wrong tokens."""

from __future__ import annotations

import pytest
import torch

from pykvcache.bench import generate, models
from pykvcache.bench.timing import WrongResult


def test_workloads_are_those_that_the_figures_name() -> None:
    totals = {name: sum(w.prompt_lengths()) for name, w in generate.WORKLOADS.items()}
    assert totals == {"mixed": 4_752, "long": 38_400}
    for workload in generate.WORKLOADS.values():
        lengths = workload.prompt_lengths()
        assert len(lengths) == 32
        assert workload.shortest <= min(lengths) <= max(lengths) <= workload.longest


def test_generate_benchmark_measures_all_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build_llama
    monkeypatch.setattr(
        generate.models,
        "build_llama",
        lambda *sizes: build(32, 64, 2, 4, 2, 128, *sizes[6:]),
    )
    workload = generate.Workload("tiny", 4, 40, output=5, seed=0, batch=6)
    steps: list[int] = []
    result = generate.measure(workload, repeats=1, block_size=8, advance=lambda: steps.append(1))
    assert len(steps) == 3
    assert set(result.timings) == {"unpatched", "patched", "no attention"}
    lengths = workload.prompt_lengths()
    block_bytes = 2 * 2 * 2 * 8 * 8 * 2  # layers, K and V, KV heads, slots, head dim, bf16
    blocks = sum(-(-(length + 4) // 8) for length in lengths)
    assert result.used_bytes == blocks * block_bytes
    assert result.padded_bytes == 6 * (max(lengths) + 5) * block_bytes // 8
    assert result.pool_bytes >= result.used_bytes


def test_generate_benchmark_refuses_wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build_llama(32, 64, 1, 2, 1, 64, torch.bfloat16)
    run = generate.generate

    def spoil(model, inputs, new_tokens):
        output = run(model, inputs, new_tokens)
        output.sequences[0, -1] += "_pykvcache_patch" in vars(model)
        return output

    monkeypatch.setattr(generate, "generate", spoil)
    with pytest.raises(WrongResult, match="nothing was timed"):
        generate.check_tokens(model, [3, 5], block_size=4)
    assert model.dtype == torch.bfloat16


def test_random_prompts_are_padded_on_the_left() -> None:
    inputs = models.random_prompts([2, 4], vocabulary=50)
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert inputs["input_ids"][0, :2].tolist() == [0, 0]
    assert (inputs["input_ids"][inputs["attention_mask"] == 1] > 0).all()
