"""Ctrl-C anywhere leaves nothing behind, and cancelling is all or nothing."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from workload import assert_empty, expected, make_engine, make_prompts, random_prompt

import pykvcache
from pykvcache import Sampling
from pykvcache.engine import Event, interrupts

ENGINE_CODE = os.path.join("pykvcache", "engine")
PROMPTS = [make_prompts()[i] for i in (0, 3, 0)]

USES: dict[str, Callable[[pykvcache.Engine], object]] = {
    "generate": lambda engine: engine.generate(PROMPTS, max_new_tokens=3, progress=False),
    "stream": lambda engine: list(engine.stream(PROMPTS, max_new_tokens=3)),
    "score": lambda engine: engine.score(PROMPTS[1], [PROMPTS[0], PROMPTS[2]]),
}


def interrupt_at(
    use: Callable[[], object], lines: set[int], numbers: Sequence[int] = (signal.SIGINT,)
) -> int:
    """Run `use` with signals, in turns, at these of the lines of the engine that it executes.

    Returns how many lines it executes.
    """
    turns = itertools.cycle(numbers)
    count = 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count in lines:
                signal.raise_signal(next(turns))
        return local

    def every(frame: FrameType, event: str, arg: Any) -> Any:
        return local if ENGINE_CODE in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(every)
    try:
        use()
    except (KeyboardInterrupt, TimeoutError):
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", USES)
def test_an_interrupt_at_any_line_leaves_nothing_behind(name: str) -> None:
    engine = make_engine(token_budget=8)
    total = interrupt_at(lambda: USES[name](engine), set())
    assert total > 500
    early = range(1, 100)  # submitting
    for line in [*early[::3], *range(100, total + 1, total // 40)]:
        interrupt_at(lambda: USES[name](engine), {line})
        assert_empty(engine)
    outputs = engine.generate(PROMPTS, max_new_tokens=3)
    assert [output.token_ids for output in outputs] == [expected("llama")[i][:3] for i in (0, 3, 0)]


@pytest.mark.parametrize("name", USES)
def test_two_interrupts_while_submitting_leave_nothing_behind(name: str) -> None:
    engine = make_engine()
    for line in range(1, 300, 4):
        interrupt_at(lambda: USES[name](engine), {line, line + line % 13 + 1})
        assert_empty(engine)


@pytest.mark.parametrize("name", ["generate", "score"])
def test_interrupts_while_cancelling_leave_nothing_behind(name: str) -> None:
    """Ctrl-C again and again, from one in the middle of the call on."""
    engine = make_engine(token_budget=8)
    total = interrupt_at(lambda: USES[name](engine), set())
    for first in range(40, total, total // 12):
        interrupt_at(lambda: USES[name](engine), set(range(first, first + 2000)))
        assert_empty(engine)


@pytest.fixture
def other_handlers() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, SIGALRM says that time is up."""

    def time_is_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    given = {signal.SIGTERM: signal.default_int_handler, signal.SIGALRM: time_is_up}
    before = {number: signal.signal(number, handler) for number, handler in given.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("other_handlers")
@pytest.mark.parametrize("name", USES)
def test_other_signals_whose_handlers_raise_leave_nothing_behind(name: str) -> None:
    engine = make_engine(token_budget=8)
    total = interrupt_at(lambda: USES[name](engine), set())
    for line in [*range(1, 100, 3), *range(100, total + 1, total // 40)]:
        for numbers in ([signal.SIGTERM], [signal.SIGALRM, signal.SIGTERM, signal.SIGINT]):
            lines = set(range(line, line + 2 * len(numbers), 2))
            interrupt_at(lambda: USES[name](engine), lines, numbers)
            assert_empty(engine)
    handlers = list(map(signal.getsignal, (signal.SIGTERM, signal.SIGALRM, signal.SIGINT)))
    assert [getattr(handler, "__name__", "") for handler in handlers] == [
        "default_int_handler", "time_is_up", "default_int_handler",
    ]  # fmt: skip


def test_an_interrupt_while_many_are_submitted_cancels_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = {
        "generate": lambda e, p: e.generate(p, max_new_tokens=2),
        "stream": lambda e, p: e.stream(p, max_new_tokens=2),
        "submit": lambda e, p: e.submit(p[0], Sampling(max_new_tokens=2, n=9)),
        "score": lambda e, p: e.score(random_prompt(9, 1), p),
    }
    for name, call in calls.items():
        engine = make_engine()
        original, count = engine._scheduler.submit, [0]

        def interrupting(request: Any, original: Any = original, count: Any = count) -> None:
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            original(request)

        monkeypatch.setattr(engine._scheduler, "submit", interrupting)
        with pytest.raises(KeyboardInterrupt) as caught:
            call(engine, make_prompts())
        assert_empty(engine)
        assert count[0] >= 3, name
        del caught


def test_a_second_interrupt_does_not_stop_the_cancelling() -> None:
    engine = make_engine()
    original, count = engine._loop.end, [0]

    def interrupting(*args: Any) -> Any:
        count[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    stream = engine.stream(make_prompts(), max_new_tokens=9)
    next(stream)
    engine._loop.end = interrupting  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    assert count[0] == len(make_prompts())
    assert_empty(engine)


def test_callbacks_hear_everything_despite_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT while tokens are settled, the last ones too: that step counts, and is heard."""
    engine = make_engine()
    original = engine._loop._settle

    def interrupting(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(engine._loop, "_settle", interrupting)
    heard: list[Event] = []
    handle = engine.submit(PROMPTS[0], max_new_tokens=4, on_token=heard.append)
    interrupts = 0
    while not handle.done:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 4
    assert [event.token_id for event in heard] == expected("llama")[0][:4]
    assert heard[-1].output is handle.outputs[0]


def test_an_interrupt_while_another_thread_has_the_engine_comes_out_at_once() -> None:
    engine = make_engine()
    taken, over = threading.Event(), threading.Event()

    def keep() -> None:
        with engine._lock:
            taken.set()
            over.wait(20)

    thread = threading.Thread(target=keep)
    thread.start()
    taken.wait()
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert time.perf_counter() - begun < 10
    over.set()
    thread.join()


def test_cancelling_is_done_for_all_samples_before_a_callback_can_raise() -> None:
    engine = make_engine()

    def complain(event: Event) -> None:
        if event.output is not None:
            raise ValueError("from the callback")

    sampling = Sampling(max_new_tokens=50, n=4, temperature=1.0)
    handle = engine.submit(PROMPTS[0], sampling, on_token=complain)
    for _ in range(4):
        engine.step()
    with pytest.raises(ValueError, match="from the callback"):
        handle.cancel()
    assert handle.done and len(handle.outputs) == 4
    assert_empty(engine)


def test_an_interrupt_in_a_callback_while_a_prompt_is_scored_loses_no_block() -> None:
    """Its event comes in the step that computed the last of the prompt."""
    engine = make_engine(prefix_cache=False)

    def complain(event: Event) -> None:
        raise KeyboardInterrupt("from the callback")

    for _ in range(2):
        engine.submit(PROMPTS[0], max_new_tokens=1, on_token=complain)
        with pytest.raises(KeyboardInterrupt, match="from the callback"):
            engine.score(random_prompt(41, 7), [PROMPTS[1]])
        assert_empty(engine)


def test_a_stream_that_the_garbage_collector_finds_inside_a_step_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()

    class Cycle:
        def __init__(self) -> None:
            self.itself = self
            self.stream = engine.stream([random_prompt(9, 5)], max_new_tokens=30)

    original, collected = engine._blocks.record, [0]

    def collecting(*args: Any) -> None:
        collected[0] += gc.collect() if not collected[0] else 0
        original(*args)

    gc.collect()
    gc.disable()
    try:
        cycle = Cycle()
        next(cycle.stream)
        del cycle  # its stream takes part in the steps of the others, and nobody has it
        monkeypatch.setattr(engine._blocks, "record", collecting)
        outputs = engine.generate(make_prompts(), max_new_tokens=10)
    finally:
        gc.enable()
    assert collected[0]
    assert [output.token_ids for output in outputs] == expected("llama")
    assert_empty(engine)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the handlers of all signals."""
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("other_handlers")
@pytest.mark.parametrize("name", USES)
def test_a_time_limit_is_not_taken_for_an_error_of_the_callback_that_runs(name: str) -> None:
    engine = make_engine(token_budget=8)
    other = engine.submit(
        PROMPTS[0], max_new_tokens=1, on_token=lambda event: signal.raise_signal(signal.SIGALRM)
    )
    with pytest.raises(TimeoutError):
        USES[name](engine)
    assert other.error is None
    other.cancel()
    assert_empty(engine)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_while_another_handler_runs_comes_at_once() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGINT))
    steps = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps.append(len(steps))
        signal.raise_signal(signal.SIGUSR1)
        return scores

    engine = make_engine()
    sampling = Sampling(max_new_tokens=20, processors=[processor])
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS[:1], sampling)
    assert len(steps) < 3
    assert_empty(engine)


@pytest.mark.usefixtures("handlers")
def test_a_handler_that_a_callback_sets_stays() -> None:
    signal.signal(signal.SIGUSR1, signal.default_int_handler)
    engine = make_engine()
    engine.submit(
        PROMPTS[0], max_new_tokens=1,
        on_token=lambda event: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )  # fmt: skip
    while engine.stats().running + engine.stats().waiting:
        engine.step()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


@pytest.mark.usefixtures("handlers")
def test_handlers_are_restored_whatever_signals_come_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two signals whose handlers raise, each as soon as its handler is back."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    pending, set_handler = [signal.SIGINT, signal.SIGTERM], signal.signal

    def set_and_raise(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        if handler is signal.default_int_handler and number in pending:
            pending.remove(number)
            signal.raise_signal(number)
        return before

    monkeypatch.setattr(signal, "signal", set_and_raise)
    with pytest.raises(KeyboardInterrupt), interrupts.uninterrupted():
        pass
    assert not pending
    assert {signal.getsignal(number) for number in numbers} == {signal.default_int_handler}
