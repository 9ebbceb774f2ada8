"""Interleaved timing: contenders take turns, so that whatever else the machine does hits all alike.

A sample is the mean time of one call over a run of calls that is long enough for the clock. Ratios
are taken between medians of one interleaved run, never between runs.

Read next: pykvcache/bench/cases.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Contender = Callable[[int], object]
"""Called with the running number of the call, by which it picks the copy of its data to touch."""

MIN_SAMPLE_SECONDS = 5e-3
MIN_ROUNDS = 3


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


def interleave(
    contenders: Mapping[str, Contender],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all contenders in turn, each round starting with another one.

    Args:
        contenders: by name.
        seconds: stop after the first round that ends later than this (at least MIN_ROUNDS rounds).
        clock: seconds; `time.process_time` for CPU time.
    """
    names = list(contenders)
    calls = {name: _calls_per_sample(contenders[name], clock) for name in names}
    numbers = dict.fromkeys(names, 0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            run, count, number = contenders[name], calls[name], numbers[name]
            start = clock()
            for call in range(number, number + count):
                run(call)
            samples[name].append((clock() - start) / count)
            numbers[name] = number + count
        rounds += 1
    return {name: Timing.of(samples[name]) for name in names}


def _calls_per_sample(run: Contender, clock: Callable[[], float]) -> int:
    """Calls that fill a sample; running them also warms the contender up."""
    count = 1
    while True:
        start = clock()
        for call in range(count):
            run(call)
        elapsed = clock() - start
        if elapsed >= MIN_SAMPLE_SECONDS:
            return count
        count = max(2 * count, int(1.2 * count * MIN_SAMPLE_SECONDS / max(elapsed, 1e-6)))
