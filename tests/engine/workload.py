"""Prompts, the outputs that `generate` gives for them one by one, and what must hold afterwards."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import VOCAB, make_model
from transformers import PreTrainedModel

import pykvcache

NEW_TOKENS = 10
PACKED = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "cohere2", "gpt_oss"),
    *("phi3", "gpt2", "gpt_neox", "opt", "mixtral", "granite", "olmo2", "starcoder2", "stablelm"),
    *("llama4", "gemma3n", "deepseek_v3", "diffllama", "jetmoe"),
)


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def make_prompts() -> list[list[int]]:
    """Short and long ones, some with a common beginning, some equal."""
    beginning = random_prompt(20, 99)
    alone = [random_prompt(n, n) for n in (5, 17, 1, 9, 30)]
    related = [beginning + random_prompt(n, n) for n in (1, 3, 7)]
    return [*alone, *related, alone[1], alone[1], beginning]


@functools.cache
def expected(family: str) -> list[list[int]]:
    """Greedy tokens of the stock model, one prompt at a time."""
    return [one_by_one(make_model(family), prompt) for prompt in make_prompts()]


def one_by_one(
    model: PreTrainedModel, prompt: list[int], new_tokens: int = NEW_TOKENS
) -> list[int]:
    tokens = model.generate(
        torch.tensor([prompt], device=model.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
    )
    return tokens[0, len(prompt) :].tolist()


def make_engine(family: str = "llama", **settings: Any) -> pykvcache.Engine:
    defaults = {"block_size": 4, "num_blocks": 200}
    return pykvcache.Engine(make_model(family), **{**defaults, **settings})


def always_swap(engine: pykvcache.Engine) -> None:
    """Whoever is preempted is swapped out, if the engine has room for that at all."""
    engine._swap.copy_seconds = lambda nbytes: 0.0  # type: ignore[method-assign]


def assert_empty(engine: pykvcache.Engine) -> None:
    """Nothing runs or waits, all memory is back, and the allocator agrees with itself."""
    stats = engine.stats()
    assert stats.swapped_bytes == 0
    assert (stats.running, stats.waiting, stats.pool.sequences) == (0, 0, 0)
    allocator = engine.pool.allocator
    assert allocator is not None
    assert allocator.num_free == allocator.num_blocks
    allocator.check_integrity()
