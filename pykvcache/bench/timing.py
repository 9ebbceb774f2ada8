"""Interleaved timing: contenders take turns, so that whatever else the machine does hits all alike.

A sample is the mean time of one call over a run of calls that is long enough for the clock. Ratios
are taken between medians of one interleaved run, never between runs.

Read next: pykvcache/bench/cases.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Contender = Callable[[int], Any]
"""Called with the running number of the call, by which it picks the copy of its data to touch."""

MIN_SAMPLE_SECONDS = 5e-3
MIN_ROUNDS = 3


class WrongResult(RuntimeError):
    """A contender's output is not what it must be, so its time means nothing."""


class Missing(Exception):
    """A peer cannot be timed; says why in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a measurement; `kept` is its result by what was timed before."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 10th and 90th percentile of the samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), cuts[0], cuts[-1], len(samples))

    def over(self, count: int) -> Timing:
        """The same timing for one of `count` equal parts of a call."""
        return Timing(self.median / count, self.p10 / count, self.p90 / count, self.samples)


def elapsed(run: Contender, first: int, count: int) -> float:
    """Seconds of calls number `first` to first + count - 1, by the host's clock."""
    start = time.perf_counter()
    for call in range(first, first + count):
        run(call)
    return time.perf_counter() - start


def interleave(
    contenders: Mapping[str, Contender],
    seconds: float,
    elapsed: Callable[[Contender, int, int], float] = elapsed,
) -> dict[str, Timing]:
    """Time short calls in turn, until a round ends later than `seconds` (and MIN_ROUNDS are done).

    Contenders are warmed up; a sample is the mean of as many calls as fill MIN_SAMPLE_SECONDS. A
    sample of several calls follows as many that are not timed: the first ones pay for what the
    contender before has left behind, such as other code in the caches and a core that slept.

    Args:
        contenders: by name.
        seconds: of the whole run.
        elapsed: times a run of calls; `gpu.elapsed` where calls return before they are done.
    """
    calls = {name: _calls_per_sample(run, elapsed) for name, run in contenders.items()}
    numbers = dict.fromkeys(contenders, 0)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        for name in _turn_order(contenders, rounds):
            run, count = contenders[name], calls[name]
            if count > 1:
                elapsed(run, numbers[name], count)
                numbers[name] += count
            samples[name].append(elapsed(run, numbers[name], count) / count)
            numbers[name] += count
        rounds += 1
    return {name: Timing.of(samples[name]) for name in contenders}


def take_turns(
    contenders: Mapping[str, Contender],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time long calls in turn: `rounds` samples of one call each, without warming up.

    Args:
        contenders: by name.
        rounds: samples of each contender.
        clock: seconds; `time.process_time` for CPU time.
        advance: called after each sample.

    Raises:
        Interrupted: on Ctrl-C, with the timings so far, if every contender has a sample; before
            that a plain KeyboardInterrupt.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    try:
        for number in range(rounds):
            for name in _turn_order(contenders, number):
                start = clock()
                contenders[name](number)
                samples[name].append(clock() - start)
                advance()
    except KeyboardInterrupt:
        if not all(samples.values()):
            raise
        raise Interrupted({name: Timing.of(samples[name]) for name in contenders}) from None
    return {name: Timing.of(samples[name]) for name in contenders}


def one_line(error: BaseException) -> str:
    """The start of what an error says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


@contextmanager
def keeping(finish: Callable[[Any], Any]) -> Iterator[None]:
    """Make what an Interrupted from inside has kept a result: finish(kept)."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(finish(stopped.kept)) from None


def _turn_order(contenders: Mapping[str, Contender], number: int) -> list[str]:
    """Names, each round starting with the next one."""
    names = list(contenders)
    first = number % len(names)
    return names[first:] + names[:first]


def _calls_per_sample(run: Contender, elapsed: Callable[[Contender, int, int], float]) -> int:
    """Calls that fill a sample; running them also warms the contender up."""
    count = 1
    while True:
        seconds = elapsed(run, 0, count)
        if seconds >= MIN_SAMPLE_SECONDS:
            return count
        count = max(2 * count, int(1.2 * count * MIN_SAMPLE_SECONDS / max(seconds, 1e-6)))
