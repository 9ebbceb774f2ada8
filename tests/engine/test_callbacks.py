"""Callbacks: every event once and in order, whatever the callbacks themselves do."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_model
from workload import assert_empty, expected, make_engine, make_prompts

import pykvcache
from pykvcache import Sampling
from pykvcache.engine import Event


def finish(engine: pykvcache.Engine, handles: list[Any]) -> None:
    while not all(handle.done for handle in handles):
        engine.step()


ACTIONS: dict[str, Callable[[pykvcache.Engine], object]] = {
    "generate": lambda engine: engine.generate([make_prompts()[2]], max_new_tokens=3),
    "step": lambda engine: engine.step(),
    "stream": lambda engine: next(engine.stream([make_prompts()[3]], max_new_tokens=3)),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_callbacks_may_run_the_engine(name: str) -> None:
    """Everybody hears its own tokens in order."""
    engine = make_engine()
    heard: list[list[int | None]] = [[] for _ in make_prompts()]

    def hear(event: Event, index: int) -> None:
        heard[index].append(event.token_id)
        if len(heard[index]) % 3 == 0:
            ACTIONS[name](engine)

    handles = [
        engine.submit(prompt, max_new_tokens=10, on_token=functools.partial(hear, index=i))
        for i, prompt in enumerate(make_prompts())
    ]
    finish(engine, handles)
    assert heard == expected("llama")
    assert_empty(engine)


def test_a_callback_that_steps_does_not_nest() -> None:
    engine = make_engine()
    depth = deepest = count = 0

    def hear(event: Event) -> None:
        nonlocal depth, deepest, count
        depth, count = depth + 1, count + 1
        deepest = max(deepest, depth)
        engine.step()
        depth -= 1

    finish(engine, [engine.submit(make_prompts()[0], max_new_tokens=100, on_token=hear)])
    assert (deepest, count) == (1, 100)


def test_the_last_event_of_a_cancelled_sample_is_its_last() -> None:
    """A callback cancels its own handle while an event of the other sample is on its way."""
    engine = make_engine()
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            handle.cancel()
            assert handle.done

    handle = engine.submit(make_prompts()[0], Sampling(max_new_tokens=9, n=2), on_token=hear)
    finish(engine, [handle])
    for output in handle.outputs:
        events = [event for event in heard if event.sample_index == output.sample_index]
        assert [event.token_id for event in events] == [*output.token_ids, None]
        assert [event.output for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].output is output
    assert_empty(engine)


@pytest.mark.parametrize("last", [False, True])
def test_a_processor_may_cancel_its_own_request(last: bool) -> None:
    """That waits until the step is over, which still gives a token."""
    engine = make_engine()
    heard: list[Event] = []

    def cancel(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == len(prompt) + 3:
            handle.cancel()
        return scores

    prompt = make_prompts()[0]
    sampling = Sampling(max_new_tokens=4 if last else 9, processors=[cancel])
    handle = engine.submit(prompt, sampling, on_token=heard.append)
    for _ in range(8):
        engine.step()
    ends = [] if last else [None]
    assert handle.done and [e.token_id for e in heard] == [*expected("llama")[0][:4], *ends]
    assert [e.output for e in heard if e.output is not None] == handle.outputs
    assert handle.outputs[0].finish_reason == ("length" if last else "cancelled")
    assert_empty(engine)


def test_a_hook_of_the_model_may_cancel_and_not_step() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=100, block_size=4, cuda_graphs=False)
    actions: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *_: actions.pop()() if actions else None)
    first, second = (engine.submit(p, max_new_tokens=10) for p in make_prompts()[:2])
    engine.step()
    actions.append(engine.step)
    with pytest.raises(RuntimeError, match=r"step\(\) was called inside of a step"):
        engine.step()
    engine.step()
    actions.append(first.cancel)
    engine.step()
    assert first.done and not second.done
    assert second.result()[0].token_ids == expected("llama")[1]
    assert_empty(engine)


def test_two_threads_that_step_keep_the_order_of_a_requests_events() -> None:
    engine = make_engine()
    prompts = make_prompts()[:4]
    heard: list[list[int | None]] = [[] for _ in prompts]

    def hear(event: Event, index: int) -> None:
        time.sleep(0.001)  # others run meanwhile
        heard[index].append(event.token_id)

    handles = [
        engine.submit(prompt, max_new_tokens=10, on_token=functools.partial(hear, index=i))
        for i, prompt in enumerate(prompts)
    ]
    threads = [threading.Thread(target=finish, args=(engine, handles)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == expected("llama")[:4]


def test_an_interrupt_outranks_what_a_callback_raised() -> None:
    engine = make_engine()

    def complain(event: Event) -> None:
        raise ValueError("from the callback")

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    handle = engine.submit(make_prompts()[0], max_new_tokens=1, on_token=complain)
    engine.submit(make_prompts()[1], max_new_tokens=1, on_token=interrupt)
    raised = None
    try:
        engine.step()
    except BaseException as error:
        raised = error
    assert isinstance(raised, KeyboardInterrupt)
    with pytest.raises(ValueError, match="from the callback"):
        handle.result()  # it is not lost


OTHERS: dict[str, Callable[[pykvcache.Engine], object]] = {
    "generate": lambda e: [o.token_ids for o in e.generate(make_prompts()[1:3], max_new_tokens=4)],
    "stream": lambda e: [x.token_id for x in e.stream([make_prompts()[1]], max_new_tokens=4)],
    "score": lambda e: [round(s.total, 3) for s in e.score(make_prompts()[1], [[7, 8], [9]])],
    "result": lambda e: e.submit(make_prompts()[1], max_new_tokens=4).result()[0].token_ids,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_callback_raises_is_its_own_requests_affair(name: str) -> None:
    engine = make_engine()
    wanted = OTHERS[name](engine)

    def complain(event: Event) -> None:
        raise BrokenPipeError("the client went away")

    handle = engine.submit(make_prompts()[0], max_new_tokens=10, on_token=complain)
    with pytest.warns(RuntimeWarning, match="BrokenPipeError.* went away"):
        assert OTHERS[name](engine) == wanted
    assert not handle.done
    with pytest.raises(BrokenPipeError):
        handle.result()  # at the next token
    with pytest.raises(BrokenPipeError):
        engine.step()
    for _ in range(20):
        with contextlib.suppress(BrokenPipeError):
            engine.step()
    assert handle.outputs[0].token_ids == expected("llama")[0]
    with pytest.raises(BrokenPipeError):
        handle.result()  # what came while others ran the engine
    assert_empty(engine)


def test_cancelling_outside_of_steps_keeps_no_events() -> None:
    engine = make_engine()
    handle = engine.submit(make_prompts()[0], max_new_tokens=9, on_token=lambda event: None)
    first = engine.step()
    handle.cancel()
    assert (len(first), engine.step(), engine._loop._heard) == (1, [], [])


RUNS: dict[str, Callable[[pykvcache.Engine], object]] = {
    **ACTIONS,
    "score": lambda engine: engine.score([5, 6], [[7]]),
    "result": lambda engine: engine.submit([5], max_new_tokens=2).result(),
}


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_a_processor_may_not_run_the_engine(name: str, caught: bool) -> None:
    """That ends its request, or nothing happens; others go on in a pool where they preempt."""
    engine = make_engine(num_blocks=14, head_room=0.0)
    heard: list[int] = []

    def run(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before = len(heard)
        if not caught:
            RUNS[name](engine)
        with contextlib.suppress(RuntimeError):
            RUNS[name](engine)
        assert len(heard) == before  # no callback inside of a step
        return scores

    def hear(event: Event) -> None:
        heard.append(event.token_id or 0)
        engine.step()  # callbacks may

    guilty = engine.submit(make_prompts()[0], Sampling(max_new_tokens=10, processors=[run]))
    handles = [
        engine.submit(prompt, Sampling(max_new_tokens=10, logprobs=0), on_token=hear)
        for prompt in make_prompts()[1:4]
    ]
    finish(engine, [guilty, *handles])
    assert [h.outputs[0].token_ids for h in handles] == expected("llama")[1:4]
    assert engine.stats().preemptions > 0
    if caught:
        assert guilty.outputs[0].token_ids == expected("llama")[0]
    else:
        with pytest.raises(RuntimeError, match=r"step\(\) was called inside of a step"):
            guilty.result()
    while engine.stats().waiting or engine.stats().running:
        engine.step()  # what `result` had submitted
    assert_empty(engine)
