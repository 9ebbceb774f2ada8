"""Requests that were swapped out go on as if nothing had happened, and so do their prefixes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import make_model
from workload import always_swap, assert_empty, make_engine, one_by_one, random_prompt

import pykvcache
from pykvcache.engine.handle import Handle

PROMPT = random_prompt(20, 1)


def swapped(engine: pykvcache.Engine, steps: int = 8, **arguments: Any) -> Handle:
    """A request that was swapped out after some steps, alone in the engine."""
    always_swap(engine)
    handle = engine.submit(PROMPT, max_new_tokens=40, **arguments)
    for _ in range(steps):
        engine.step()
    engine._scheduler.preempt(handle.samples[0].request)
    assert engine.stats().preemption_log[-1].method == "swap"
    return handle


def swapping_engine(family: str = "llama", **settings: Any) -> pykvcache.Engine:
    return make_engine(family, swap_memory="1GiB", **settings)


@pytest.mark.parametrize(
    ("family", "steps"), [("llama", 1), ("llama", 5), ("gemma3", 8), ("llama4", 5), ("gpt_oss", 8)]
)
def test_what_comes_back_is_found_as_the_text_that_it_is(family: str, steps: int) -> None:
    engine, model = swapping_engine(family), make_model(family)
    whole = one_by_one(model, PROMPT, 40)
    assert swapped(engine, steps, salt=5).result()[0].token_ids == whole
    text = whole[steps - 1 : steps + 19]  # computed since then, and nobody's beginning
    for salt in (0, 5):
        output = engine.generate([text], max_new_tokens=1, salt=salt)[0]
        assert (output.token_ids, output.cached_tokens) == (one_by_one(model, text, 1), 0)
    again = engine.generate([PROMPT + whole[:30]], max_new_tokens=10, salt=5)[0]
    assert (again.cached_tokens, again.token_ids) == (len(PROMPT) + 29, whole[30:])
    assert_empty(engine)


def test_known_text_does_not_replace_what_comes_back() -> None:
    whole = one_by_one(make_model("llama"), PROMPT, 40)
    engine = swapping_engine()
    engine.generate([whole[7:27]], max_new_tokens=1)
    assert swapped(engine, 8).result()[0].token_ids == whole


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_the_pool_need_not_remember_anything(family: str) -> None:
    """Everything comes from host memory, next to somebody who begins with some of it."""
    whole = one_by_one(make_model(family), PROMPT, 40)
    engine = swapping_engine(family, num_blocks=60)
    handle = swapped(engine)
    engine._allocator.forget_prefixes()
    others = [PROMPT[:18] + random_prompt(5, 2), random_prompt(30, 3)]
    handles = [engine.submit(other, max_new_tokens=9) for other in others]
    assert handle.result()[0].token_ids == whole
    for other, request in zip(others, handles, strict=True):
        assert request.result()[0].token_ids == one_by_one(make_model(family), other, 9)
    assert_empty(engine)


def test_priority_of_the_blocks_comes_back() -> None:
    engine = swapping_engine(num_blocks=30)
    handle = swapped(engine, priority=3)
    text = PROMPT + handle.result()[0].token_ids[:30]
    for seed in range(6):  # these are evicted first
        engine.generate([random_prompt(20, 10 + seed)], max_new_tokens=2)
    assert engine.generate([text], max_new_tokens=1)[0].cached_tokens == len(text) - 1


@pytest.mark.parametrize("when", ["before", "while"])
def test_other_weights_do_not_find_what_was_swapped(when: str) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=100, block_size=4, swap_memory="1GiB")
    always_swap(engine)
    handle = engine.submit(PROMPT, max_new_tokens=40)
    for _ in range(8):
        engine.step()

    def change() -> None:
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
        engine.weights_changed()

    if when == "before":
        change()
    engine._scheduler.preempt(handle.samples[0].request)
    assert engine.stats().preemption_log[0].method == ("swap" if when == "while" else "recompute")
    if when == "while":
        change()
    handle.result()
    assert engine._swap.used == 0
    output = engine.generate([PROMPT], max_new_tokens=8)[0]
    assert output.token_ids == one_by_one(model, PROMPT, 8)
    assert_empty(engine)


def test_a_failure_on_the_way_back_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = swapping_engine()
    handle = swapped(engine)
    record, calls = engine._blocks.record, [0]

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("on purpose")
        record(*args)

    monkeypatch.setattr(engine._blocks, "record", failing)
    engine._allocator.forget_prefixes()
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.step()
    assert handle.result()[0].token_ids == one_by_one(make_model("llama"), PROMPT, 40)
    assert_empty(engine)


def test_scores_of_a_single_token_keep_their_salt() -> None:
    engine = make_engine()
    engine.score([5], [PROMPT], salt=7)
    output = engine.generate([[5, *PROMPT]], max_new_tokens=2)[0]
    assert output.cached_tokens == 0
