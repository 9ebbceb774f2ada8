"""Caches made by hand, copied, dropped, grown or full, and those of transformers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DEVICE, make_model
from transformers import DynamicCache, PreTrainedModel
from ways import NEW_TOKENS, PADS, PROMPT, greedy_tokens, inputs_for

import pykvcache
from pykvcache.hf import PagedCache, counters


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "llama4"])
@pytest.mark.parametrize("is_patched", [True, False])
def test_cache_by_hand(family: str, is_patched: bool, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = greedy_tokens(model)
    if is_patched:
        pykvcache.patch(model, backend=backend)
    cache = PagedCache(model.config, num_blocks=200, block_size=4, backend=backend)
    assert torch.equal(greedy_tokens(model, past_key_values=cache), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    cache.reset()
    assert cache.stats()["used_blocks"] == 0
    assert torch.equal(greedy_tokens(model, past_key_values=cache), expected)


def test_other_caches_pass_through(llama: PreTrainedModel) -> None:
    expected = greedy_tokens(llama)
    by_hand = DynamicCache(config=llama.config)
    pykvcache.patch(llama)
    counters.reset()
    assert torch.equal(greedy_tokens(llama, past_key_values=by_hand), expected)
    assert by_hand.get_seq_length() == expected.shape[1] - 1
    assert torch.equal(greedy_tokens(llama, cache_implementation="static"), expected)
    assert torch.equal(greedy_tokens(llama, use_cache=False), expected)
    assert counters.paged == 0


def test_padding_is_not_stored(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    out = greedy_tokens(llama, return_dict_in_generate=True)
    stored = out.past_key_values.stats()["tokens"]
    assert stored == len(PADS) * (PROMPT + NEW_TOKENS - 1) - sum(PADS)


def test_blocks_outside_the_window_are_given_back() -> None:
    model = copy.deepcopy(make_model("mistral"))
    pykvcache.patch(model, block_size=2)
    out = greedy_tokens(model, return_dict_in_generate=True, max_new_tokens=40)
    stats = out.past_key_values.stats()
    assert stats["used_blocks"] <= len(PADS) * 4
    assert stats["peak_blocks"] <= len(PADS) * (PROMPT + 1)


def test_dropped_copies_free_their_blocks(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    with torch.no_grad():
        cache = llama(**inputs_for(llama)).past_key_values
    allocator = cache.pool.allocator
    twin = copy.deepcopy(cache)
    assert allocator.num_sequences == 2 * len(PADS)
    used = cache.stats()["used_blocks"]
    assert twin.stats()["sharing_factor"] == 2.0
    with torch.no_grad():
        llama(torch.ones(len(PADS), 1, dtype=torch.long).to(DEVICE), past_key_values=twin)
    assert cache.stats()["used_blocks"] > used
    del twin
    assert allocator.num_sequences == len(PADS)
    assert cache.stats()["used_blocks"] == used
    allocator.check_integrity()


def test_copies_of_an_empty_cache_are_apart(llama: PreTrainedModel) -> None:
    first, inputs = PagedCache(llama.config, block_size=4), inputs_for(llama)
    second = copy.deepcopy(first)
    with torch.no_grad():
        expected = llama(**inputs).logits
        for cache, ids in ((first, inputs["input_ids"]), (second, inputs["input_ids"].flip(1))):
            llama(ids[:, :-1], past_key_values=cache)
        last = inputs["input_ids"][:, -1:]
        alone = llama(inputs["input_ids"]).logits[:, -1:]
        torch.testing.assert_close(llama(last, past_key_values=first).logits, alone)
    assert expected.shape[0] == len(last)


@pytest.mark.slow
def test_copies_of_a_cache_grow_their_pool_from_several_threads(llama: PreTrainedModel) -> None:
    prompt = torch.randint(3, 60, (1, 40)).to(DEVICE)
    tails = [torch.cat([prompt, torch.randint(3, 60, (1, 4)).to(DEVICE)], 1) for _ in range(4)]

    def run(cache: Any, ids: torch.Tensor) -> torch.Tensor:
        return llama.generate(
            ids, past_key_values=cache, max_new_tokens=150, min_new_tokens=150, do_sample=False
        )

    expected = [run(DynamicCache(config=llama.config), ids) for ids in tails]
    pykvcache.patch(llama)
    for _ in range(3):
        first = PagedCache(llama.config)
        with torch.no_grad():
            llama(prompt, past_key_values=first)
        caches = [copy.deepcopy(first) for _ in tails]
        with ThreadPoolExecutor(len(tails)) as pool:
            got = list(pool.map(run, caches, tails))
        for tokens, wanted in zip(got, expected, strict=True):
            assert torch.equal(tokens, wanted)


def test_growing_pool(llama: PreTrainedModel) -> None:
    expected = greedy_tokens(llama, max_new_tokens=60)
    pykvcache.patch(llama)
    cache = PagedCache(llama.config, block_size=1)
    assert torch.equal(greedy_tokens(llama, past_key_values=cache, max_new_tokens=60), expected)
    assert cache.stats()["num_blocks"] >= len(PADS) * 60


def test_a_full_pool_leaves_an_empty_cache_empty(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache, ids = PagedCache(llama.config, num_blocks=1), inputs_for(llama)["input_ids"]
    with pytest.raises(RuntimeError, match="blocks"):
        llama.generate(ids.repeat(3, 4), past_key_values=cache, max_new_tokens=2)
    assert llama.generate(ids[:1, :4], past_key_values=cache, max_new_tokens=2).shape == (1, 6)


def test_plot(llama: PreTrainedModel, tmp_path: Path) -> None:
    pykvcache.patch(llama, block_size=4)
    with torch.no_grad():
        cache = llama(**inputs_for(llama)).past_key_values
    cache.plot(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        PagedCache(llama.config).plot(tmp_path / "none.png")
