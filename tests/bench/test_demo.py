"""The demo's prompts, and the bytes of a dense cache."""

from __future__ import annotations

import torch

from pykvcache.bench.demo import dense_bytes, prompt_lengths


def test_demo_prompts_follow_the_trace() -> None:
    lengths = prompt_lengths(200, seed=1)
    assert lengths == prompt_lengths(200, seed=1) != prompt_lengths(200, seed=2)
    assert min(lengths) >= 4 and max(lengths) <= 768 and len(set(lengths)) > 50


def test_dense_bytes_counts_padding_as_waste() -> None:
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 10, 4), torch.zeros(2, 3, 10, 4), 0)
    held, needed = dense_bytes(cache, [10, 5])
    assert held == 2 * 2 * 3 * 10 * 4 * 4
    assert needed == held * 15 // 20
