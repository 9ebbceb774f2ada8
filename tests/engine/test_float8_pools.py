"""An engine with a float8 pool gives what a patched model gives with such a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make_model
from workload import always_swap, assert_empty, make_engine, make_prompts, one_by_one

import pykvcache

FLOAT8 = "float8_e4m3fn"
FAMILIES = ("llama", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "diffllama")


def patched_tokens(family: str, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    model = copy.deepcopy(make_model(family))
    pykvcache.patch(model, block_size=4, kv_dtype=FLOAT8)
    return [one_by_one(model, prompt, new_tokens) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_patched(family: str) -> None:
    prompts = make_prompts()
    engine = make_engine(family, kv_dtype=FLOAT8)
    outputs = engine.generate(prompts, max_new_tokens=10)
    assert [output.token_ids for output in outputs] == patched_tokens(family, prompts, 10)
    assert any(output.cached_tokens for output in outputs)
    assert_empty(engine)


@pytest.mark.parametrize("swap_memory", ["0", "1GiB"])
def test_preempted_requests_go_on(swap_memory: str) -> None:
    """A pool for a third of them: blocks go to host memory with their scales, or are computed."""
    prompts = make_prompts()
    engine = make_engine(num_blocks=40, kv_dtype=FLOAT8, swap_memory=swap_memory)
    if swap_memory != "0":
        always_swap(engine)
    outputs = engine.generate(prompts, max_new_tokens=40)
    assert [output.token_ids for output in outputs] == patched_tokens("llama", prompts, 40)
    methods = {entry.method for entry in engine.stats().preemption_log}
    assert methods == {"swap" if swap_memory != "0" else "recompute"}
    assert_empty(engine)


def test_samples_share_a_prompt() -> None:
    """Copies on write take the scales along: greedy samples are all the same."""
    prompt = make_prompts()[4][:-1]  # ends within a block
    engine = make_engine(kv_dtype=FLOAT8, prefix_cache=False)
    handles = [engine.submit(prompt, max_new_tokens=12) for _ in range(3)]
    expected = patched_tokens("llama", [prompt], 12)[0]
    assert [handle.result()[0].token_ids for handle in handles] == [expected] * 3
    assert engine.stats().pool.copies > 0


def test_memory_is_that_of_bytes() -> None:
    blocks = {
        name: make_engine(num_blocks=None, memory="1MiB", kv_dtype=name).pool
        for name in ("float32", FLOAT8)
    }
    assert blocks[FLOAT8].allocated_bytes <= 2**20
    assert blocks[FLOAT8].num_blocks > 2 * blocks["float32"].num_blocks - 2
    assert blocks[FLOAT8].caches(0)[0].dtype == torch.float8_e4m3fn
