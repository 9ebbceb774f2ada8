"""Weights that change while requests wait: those take nothing that is stale, and looks are rare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_model
from workload import always_swap, assert_empty, make_prompts, one_by_one, random_prompt

import pykvcache
from pykvcache import Sampling


def write_all(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(1.3)


def write_frequencies(model: Any) -> None:
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.5)


CHANGES = [write_all, write_frequencies]
BASE = random_prompt(24, 3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("later", [1, 2])
def test_a_request_that_waited_takes_no_stale_prefix(
    change: Callable[[Any], None], later: int
) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100, max_running=1)
    engine.submit([*BASE, 5], max_new_tokens=4)
    handles = [engine.submit([*BASE, 9 + i], max_new_tokens=8) for i in range(later)]
    engine.step()
    engine.step()
    change(model)
    for i, handle in enumerate(handles):  # the second takes what the first has computed anew
        output = handle.result()[0]
        assert output.token_ids == one_by_one(model, [*BASE, 9 + i], 8)
        assert output.cached_tokens == (len(BASE) if i else 0)
    assert_empty(engine)


@pytest.mark.parametrize("change", CHANGES)
def test_equal_prompts_do_not_share_one_that_was_begun_with_other_weights(
    change: Callable[[Any], None],
) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100, token_budget=10)
    handles = [engine.submit(BASE, max_new_tokens=8) for _ in range(2)]
    engine.step()
    change(model)
    second = handles[1].result()[0]
    assert (second.token_ids, second.cached_tokens) == (one_by_one(model, BASE, 8), 0)
    handles[0].result()
    assert_empty(engine)


@pytest.mark.parametrize("swap", [False, True])
def test_a_preempted_request_comes_back_without_stale_blocks(swap: bool) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(
        model, block_size=4, num_blocks=100, swap_memory="1MiB" if swap else None
    )
    if swap:
        always_swap(engine)
    handle = engine.submit(BASE, max_new_tokens=8)
    engine.step()
    first = engine._loop.lanes.requests[int(engine._loop.lanes.active[0])]
    assert first is not None
    engine._scheduler.preempt(first)
    write_all(model)
    tokens = handle.result()[0].token_ids
    assert tokens[1:] == one_by_one(model, [*BASE, tokens[0]], 7)
    assert_empty(engine)


def test_an_error_in_the_look_leaves_the_request_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget, prompts in ((2048, ([*BASE, 5], [*BASE, 9])), (10, (BASE, BASE))):
        model = copy.deepcopy(make_model("llama"))
        engine = pykvcache.Engine(
            model, block_size=4, num_blocks=100, token_budget=budget, max_running=2 - budget // 2048
        )
        handles = [engine.submit(prompt, max_new_tokens=4) for prompt in prompts]
        engine.step()
        write_all(model)

        def fail(*args: Any) -> None:
            raise MemoryError("no memory for samples")

        monkeypatch.setattr(engine._guard, "accept", fail)
        with pytest.raises(MemoryError):
            for _ in range(8):
                engine.step()
        assert engine.stats().waiting
        monkeypatch.undo()
        output = handles[1].result()[0]
        assert (output.token_ids, output.cached_tokens) == (one_by_one(model, prompts[1], 4), 0)
        handles[0].result()
        assert_empty(engine)


def test_values_are_compared_only_where_something_is_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = pykvcache.Engine(make_model("llama"), block_size=4, num_blocks=100, max_running=3)
    looks: list[int] = []
    samples = engine._guard._weights.samples
    monkeypatch.setattr(
        engine._guard._weights,
        "samples",
        lambda: (looks.append(engine._scheduler.steps), samples())[1],
    )
    prompts = [*make_prompts()[:3], *([*BASE, i] for i in range(9))]
    handles = [engine.submit(prompt, Sampling(max_new_tokens=10)) for prompt in prompts]
    while not all(handle.done for handle in handles):
        engine.step()
    shared = [handle for handle in handles if handle.outputs[0].cached_tokens]
    assert len(shared) == 6
    assert len(looks) == len(set(looks)) <= 1 + len(shared)  # the first for the arrivals
    assert engine._scheduler.steps > 35
