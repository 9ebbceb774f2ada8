"""Counts and times of an engine: `EngineStats`, and the `Meter` that keeps them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pykvcache.allocator import BlockAllocator
from pykvcache.engine.sampling import Output
from pykvcache.pool_stats import PoolStats

if TYPE_CHECKING:
    from pykvcache.engine.scheduler import Scheduler
    from pykvcache.engine.step import Preemption
    from pykvcache.engine.swap import SwapSpace

KEPT = 10_000  # newest steps and outputs that times are taken from
KEPT_GAPS = 100_000  # newest tokens, the same


FloatArray = NDArray[np.float64]
NO_GAPS: FloatArray = np.zeros(0)


@dataclass(frozen=True)
class Times:
    """Seconds: mean, median, 99th percentile and largest of the newest ones; 0 without any."""

    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, seconds: deque[float] | FloatArray) -> Times:
        """Of durations."""
        if not len(seconds):
            return cls()
        array = np.array(seconds)
        p50, p99 = np.percentile(array, [50, 99])
        return cls(float(array.mean()), float(p50), float(p99), float(array.max()))


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine.

    Attributes:
        pool: where the slots are now; `pool.percent()` sums to 100 %.
        hit_rate: share of prompt tokens that were not computed for the sample.
        preemptions: how often blocks of a request were taken away.
        recomputed_tokens: tokens lost to that.
        preemption_log: the newest 1,000.
        swapped_bytes, peak_swapped_bytes: in host memory.
        waiting, running: requests now.
        steps, step_time: of forwards; times of the newest 10,000.
        mean_rows: rows a step.
        finished, cancelled: samples. scored: completions.
        prompt_tokens: of ended samples and scored completions. Samples that ended before they had
            their turn count in `cancelled` only.
        output_tokens: of ended samples.
        tokens_per_second: tokens generated over the time in which steps ran.
        queue_time, time_to_first_token: of the newest 10,000 ended samples.
        time_between_tokens: from the token before to each of the newest 100,000 tokens, whatever
            came between: long prompts of others, a preemption, time without a step.
    """

    pool: PoolStats
    hit_rate: float
    preemptions: int
    recomputed_tokens: int
    preemption_log: tuple[Preemption, ...]
    swapped_bytes: int
    peak_swapped_bytes: int
    waiting: int
    running: int
    steps: int
    step_time: Times
    mean_rows: float
    finished: int
    cancelled: int
    scored: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    queue_time: Times
    time_to_first_token: Times
    time_between_tokens: Times


class Meter:
    """Adds up what the engine reports."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._preemptions, self._recomputed = scheduler.num_preemptions, scheduler.recomputed_tokens
        self._first_step_number = scheduler.steps
        self._steps = self._rows = self._tokens = 0
        self._busy = 0.0
        self._finished = self._cancelled = self._scored = self._generated = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._step_times: deque[float] = deque(maxlen=KEPT)
        self._queued: deque[float] = deque(maxlen=KEPT)
        self._first: deque[float] = deque(maxlen=KEPT)
        self._between, self._gaps = np.zeros(KEPT_GAPS), 0

    @property
    def rate(self) -> float:
        """Tokens computed a second, prompts included."""
        return self._tokens / self._busy if self._busy else 0.0

    def step(self, rows: int, tokens: int, seconds: float) -> None:
        """A step ran."""
        self._steps += 1
        self._rows += rows
        self._tokens += tokens
        self._busy += seconds
        self._step_times.append(seconds)

    def generated(self, tokens: int, gaps: FloatArray = NO_GAPS) -> None:
        """So many samples got a token; seconds since their last one, of those that had one."""
        self._generated += tokens
        begin = self._gaps % KEPT_GAPS
        end = begin + len(gaps)
        if end <= KEPT_GAPS:
            self._between[begin:end] = gaps
        else:
            self._between[np.arange(begin, end) % KEPT_GAPS] = gaps
        self._gaps += len(gaps)

    def scored(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A completion was scored."""
        self._scored += 1
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens

    def finished(self, output: Output, started: bool) -> None:
        """A sample ended; `started`: its prompt was computed, or found, at least in part."""
        if output.finish_reason == "cancelled":
            self._cancelled += 1
        else:
            self._finished += 1
        if not started:
            return
        count = len(output.token_ids)
        self._prompt_tokens += output.prompt_tokens
        self._cached_tokens += output.cached_tokens
        self._output_tokens += count
        self._queued.append(output.queued)
        if count:
            self._first.append(output.first_token)

    def stats(
        self, scheduler: Scheduler, allocator: BlockAllocator, swap: SwapSpace
    ) -> EngineStats:
        """The sums, with what the others know."""
        return EngineStats(
            allocator.stats(),
            self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 0.0,
            scheduler.num_preemptions - self._preemptions,
            scheduler.recomputed_tokens - self._recomputed,
            tuple(p for p in scheduler.preemptions if p.step > self._first_step_number),
            swap.used,
            swap.peak,
            scheduler.num_waiting,
            scheduler.num_running,
            self._steps,
            Times.of(self._step_times),
            self._rows / self._steps if self._steps else 0.0,
            self._finished,
            self._cancelled,
            self._scored,
            self._prompt_tokens,
            self._output_tokens,
            self._generated / self._busy if self._busy else 0.0,
            Times.of(self._queued),
            Times.of(self._first),
            Times.of(self._between[: min(self._gaps, KEPT_GAPS)]),
        )
