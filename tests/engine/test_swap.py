"""Requests that were swapped out go on as if nothing had happened, and so do their prefixes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from families import make_model
from workload import always_swap, assert_empty, make_engine, one_by_one, random_prompt

import pykvcache
from pykvcache import Sampling
from pykvcache.engine.handle import Handle
from pykvcache.engine.request import Request

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


def moving_takes(engine: pykvcache.Engine, seconds: float) -> None:
    engine._swap.copy_seconds = lambda nbytes: seconds  # type: ignore[method-assign]


def preempt(engine: pykvcache.Engine, request: Request, swap: bool) -> None:
    moving_takes(engine, 0.0 if swap else 1e9)
    engine._scheduler.preempt(request)
    method = "swap" if swap else "recompute"
    assert engine.stats().preemption_log[-1].method == method


def run_until_all_run(engine: pykvcache.Engine, requests: list[Request]) -> None:
    while min(request.lane for request in requests) < 0:
        engine.step()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_sample_that_goes_on_from_its_prompt_gives_back_its_copy(prefix_cache: bool) -> None:
    """The third sample waits, so that the blocks of the prompt are kept for it."""
    engine = swapping_engine(max_running=2, prefix_cache=prefix_cache)
    whole = one_by_one(make_model("llama"), PROMPT, 40)
    handle = engine.submit(PROMPT, Sampling(max_new_tokens=40, n=3))
    requests = [sample.request for sample in handle.samples]
    run_until_all_run(engine, requests[:2])
    for _ in range(4):
        engine.step()
    for _ in range(3):
        known = int(engine._scheduler.lanes.known[requests[1].lane])
        preempt(engine, requests[1], swap=True)
        held = engine.stats().swapped_bytes
        assert requests[1].swapped is not None and held == requests[1].swapped.nbytes
        engine.step()
        lane = requests[1].lane
        assert engine.stats().swapped_bytes == 0
        assert engine._scheduler.lanes.computed[lane] == known  # nothing again
        assert engine.stats().pool.used_blocks <= blocks_of(engine, handle)
    assert [output.token_ids for output in handle.result()] == [whole] * 3
    assert_empty(engine)


def blocks_of(engine: pykvcache.Engine, handle: Handle) -> int:
    """Blocks of 4 tokens of running samples that share those of their prompt."""
    lanes = [s.request.lane for s in handle.samples if s.request.lane >= 0]
    shared, computed = len(PROMPT) // 4, engine._scheduler.lanes.computed[lanes].tolist()
    return shared + sum(-(-tokens // 4) - shared for tokens in computed)


def test_a_sample_that_comes_back_needs_no_room_for_its_prompt() -> None:
    """20 blocks of 40 are the prompt's, and two samples still hold them."""
    engine = swapping_engine(num_blocks=40, head_room=0.0)
    prompt = random_prompt(80, 1)
    handle = engine.submit(prompt, Sampling(max_new_tokens=20, n=3))
    requests = [sample.request for sample in handle.samples]
    run_until_all_run(engine, requests)
    for _ in range(5):
        engine.step()
    preempt(engine, requests[2], swap=True)
    engine.step()
    assert engine.stats().running == 3
    whole = one_by_one(make_model("llama"), prompt, 20)
    assert [output.token_ids for output in handle.result()] == [whole] * 3
    assert_empty(engine)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_copy_of_old_weights_is_given_up_by_a_sample_that_goes_on(prefix_cache: bool) -> None:
    """It comes back with the blocks of its prompt, and is preempted once more."""
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(
        model,
        block_size=4,
        num_blocks=60,
        head_room=0.0,
        token_budget=5,
        swap_memory="1GiB",
        prefix_cache=prefix_cache,
    )
    sampling = Sampling(max_new_tokens=30, n=4, temperature=1.0, seed=0)
    handle = engine.submit(random_prompt(8, 1), sampling)
    requests = [sample.request for sample in handle.samples]
    run_until_all_run(engine, requests)
    for _ in range(3):
        engine.step()
    preempt(engine, requests[2], swap=True)
    for request in (requests[1], requests[3]):
        preempt(engine, request, swap=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    run_until_all_run(engine, requests[2:])
    assert engine.stats().swapped_bytes == 0
    preempt(engine, requests[2], swap=False)
    allocator = engine.pool.allocator
    assert allocator is not None
    evicting = random_prompt(4 * allocator.num_free - 9, 99)
    engine.submit(evicting, max_new_tokens=1, priority=1000).result()
    run_until_all_run(engine, [requests[2]])
    lanes, lane = engine._scheduler.lanes, requests[2].lane
    while lanes.computed[lane] < lanes.known[lane] - 1:
        engine.step()
    text = [*lanes.tokens[lane, : int(lanes.known[lane]) - 1].tolist(), 50]
    output = engine.generate([text], max_new_tokens=8)[0]
    assert output.token_ids == one_by_one(model, text, 8)
    assert bool(output.cached_tokens) == prefix_cache
    handle.result()
    assert_empty(engine)


@pytest.mark.parametrize("seed", range(24))
def test_schedules_with_swapping_leave_nothing_behind(seed: int) -> None:
    """Samples of equal prompts, cancellations, new weights and pools that are too small."""
    run_schedule(seed, "llama" if seed % 3 else "gemma3")


def run_schedule(seed: int, family: str) -> None:
    rng = random.Random(seed)
    model = copy.deepcopy(make_model(family))
    engine = pykvcache.Engine(
        model,
        block_size=rng.choice([1, 4]),
        num_blocks=rng.choice([100, 130, 200]),
        max_running=rng.choice([2, 4, 8]),
        token_budget=rng.choice([5, 16, 2048]),
        head_room=0.0,
        prefix_cache=rng.random() < 0.6,
        swap_memory=rng.choice([20_000, "1GiB"]),
    )
    always_swap(engine)
    prompts = [random_prompt(rng.randrange(2, 16), number) for number in range(3)]
    for _ in range(3):  # with these weights, then with others
        handles: list[tuple[list[int], Handle]] = []
        for _ in range(rng.randrange(2, 6)):
            prompt = rng.choice(prompts)
            sampling = Sampling(max_new_tokens=rng.randrange(1, 16), n=rng.choice([1, 3, 4]))
            priority = rng.choice([0, 0, 1])
            handles.append((prompt, engine.submit(prompt, sampling, priority=priority)))
            for _ in range(rng.randrange(6)):
                engine.step()
            disturb(engine, rng)
        if rng.random() < 0.3:
            handles.pop(rng.randrange(len(handles)))[1].cancel()
        if rng.random() < 0.5:  # those that run go on with what they have
            change(model, rng)
            prompt = rng.choice(prompts)
            handles = [(prompt, engine.submit(prompt, Sampling(max_new_tokens=9, n=2)))]
        for prompt, handle in handles:
            for output in handle.result():
                assert output.token_ids == one_by_one(model, prompt, len(output.token_ids))
        while engine.stats().running + engine.stats().waiting:
            engine.step()
        assert_empty(engine)


def disturb(engine: pykvcache.Engine, rng: random.Random) -> None:
    """Preempt some of those who run, but not the first."""
    running = engine._scheduler.lanes.active[1:].tolist()
    for lane in rng.sample(running, rng.randrange(len(running) + 1)):
        request = engine._scheduler.lanes.requests[lane]
        assert request is not None
        moving_takes(engine, rng.choice([0.0, 0.0, 0.0, 1e9]))
        engine._scheduler.preempt(request)
    always_swap(engine)


def change(model: Any, rng: random.Random) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(rng.choice([0.8, 1.3]))


def test_scores_of_a_single_token_keep_their_salt() -> None:
    engine = make_engine()
    engine.score([5], [PROMPT], salt=7)
    output = engine.generate([[5, *PROMPT]], max_new_tokens=2)[0]
    assert output.cached_tokens == 0


def test_what_computing_again_costs_is_measured_without_prompts_too() -> None:
    """Prompts of one token are decode steps from the first on."""
    engine = make_engine(num_blocks=14, head_room=0.0, prefix_cache=False)
    handles = [engine.submit([token], max_new_tokens=40) for token in (5, 7, 9)]
    while not engine.stats().preemptions:
        engine.step()
    entry, busy = engine.stats().preemption_log[0], engine.stats().step_time.max
    assert engine._swap.token_rate == 0  # nothing was computed in chunks
    assert 0 < entry.seconds <= entry.tokens * busy
    for _ in range(3):
        engine._swap.observe(1000, 1.0, prompts=True)
    assert engine._swap.compute_seconds(500) == 0.5
    for handle in handles:
        handle.cancel()
    assert_empty(engine)


def test_the_log_says_what_a_swap_took_not_what_it_saved() -> None:
    engine = make_engine(swap_memory="1MiB")
    engine._swap.compute_seconds = lambda tokens: 1e6  # type: ignore[method-assign]
    handle = engine.submit(PROMPT, max_new_tokens=9)
    engine.step()
    preempt(engine, handle.samples[0].request, swap=True)
    assert 0 < engine.stats().preemption_log[-1].seconds < 60
    assert handle.result()[0].token_ids == one_by_one(make_model("llama"), PROMPT, 9)
    assert_empty(engine)
