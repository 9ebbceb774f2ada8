"""Continuous batching over a space: requests join and leave at every step.

First come, first served. A step in which requests join computes their prompts and nothing else
(prefill first); other steps give every row one token. When the rows have no room for another token,
the newest is preempted: its memory is taken back, it goes to the front of the queue, and everything
it had cached is computed again when it returns.

Steps without joining, leaving or preemption are taken together. Their durations and lengths are
known in closed form, so averages over time are those of step-by-step replay. Read next: padded.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.queue import Job, Queue
from pykvcache.bench.replay.rows import Rows
from pykvcache.bench.replay.space import Space
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.traces import Request

Observer: TypeAlias = Callable[[float, Rows], object]
VICTIMS = ("newest", "cheapest")
SCHEDULERS = ("prefill-first", "engine")
MOST_STEPS_AT_ONCE = 4096
REPORT_EVERY = 256


@dataclass(frozen=True)
class Rules:
    """What is common to all policies of a replay.

    Attributes:
        cost: seconds of a step.
        saturated: all requests wait from the start; otherwise they arrive as the trace says.
        head_room: share of the blocks that an admission leaves free for running rows (paged).
        victim: whom to preempt: "newest", or "cheapest", the row with the fewest cached tokens.
        scheduler: "prefill-first" is this file for every policy; "engine" runs the paged ones with
            the engine's scheduler, which chooses victims itself.
        token_budget, max_running, prefix_cache: of the engine's scheduler.
    """

    cost: StepCost = field(default_factory=StepCost)
    saturated: bool = True
    head_room: float = 0.05
    victim: str = "newest"
    scheduler: str = "prefill-first"
    token_budget: int = 2048
    max_running: int = 256
    prefix_cache: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.head_room < 1:
            raise ValueError(f"head_room must be at least 0 and below 1, got {self.head_room}")
        if self.victim not in VICTIMS:
            raise ValueError(f"victim must be one of {', '.join(VICTIMS)}, got {self.victim!r}")
        if self.scheduler not in SCHEDULERS:
            names = ", ".join(SCHEDULERS)
            raise ValueError(f"scheduler must be one of {names}, got {self.scheduler!r}")
        for name in ("token_budget", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Replay:
    """One trace through one space.

    Args:
        requests: in order of arrival; none longer than the policies' max_len.
        space: where memory comes from.
        result: gets the sums.
        rules: what a step costs, when requests arrive.
        advance: called with numbers of requests that were finished or refused.
        observe: called before each step or run of steps with (seconds since the start, rows).
    """

    def __init__(
        self,
        requests: Iterable[Request],
        space: Space,
        result: Result,
        rules: Rules,
        advance: Callable[[int], object] = lambda count: None,
        observe: Observer | None = None,
    ) -> None:
        self.queue = Queue(requests, space.holds, rules.saturated)
        self.rows = Rows()
        self.space = space
        self.result = result
        self.cost, self.victim = rules.cost, rules.victim
        self.clock = 0.0
        self._advance = advance
        self._observe = observe
        self._reported = 0

    def run(self) -> Result:
        """Serve every request."""
        while True:
            admitted = self._admit()
            if self._observe is not None and self.rows.count:
                self._observe(self.clock, self.rows)
            if admitted:
                self._prefill(admitted)
            elif self.rows.count:
                self._decode()
            elif self.queue.next_arrival < math.inf:
                self.result.seconds.idle += self.queue.next_arrival - self.clock
                self.clock = self.queue.next_arrival
            else:
                break
        self.result.refused = self.queue.refused
        self._report(1)
        return self.result

    def _admit(self) -> int:
        """Let requests join while there is room; returns the tokens to compute for them."""
        tokens = 0
        while (job := self.queue.head(self.clock)) is not None:
            handle = self.space.admit(job, self.rows.count == 0)
            if handle is None:
                break
            self.queue.pop()
            self.rows.add(job.prefill, job.final, job.prompt, job.output, handle)
            tokens += job.prefill
            if job.prefill == job.prompt:
                self.result.prompt_tokens += job.prompt
        return tokens

    def _prefill(self, tokens: int) -> None:
        rows = self.rows
        live = int(rows.length.sum())
        duration = self.result.seconds.add_step(self.cost, live, tokens)
        usage = self.space.now(rows)
        self.result.running.add(duration, live, usage, rows.count)
        if self.queue.head(self.clock) is not None:
            self.result.waiting.add(duration, live, usage, rows.count)
        self.clock += duration
        self.result.peak_batch = max(self.result.peak_batch, rows.count)
        self._finish()

    def _decode(self) -> None:
        rows, cost, seconds = self.rows, self.cost, self.result.seconds
        while True:
            waits = self.queue.head(self.clock) is not None
            limit = min(int((rows.final - rows.length).min()), MOST_STEPS_AT_ONCE)
            live_before = int(rows.length.sum())
            if not waits and self.queue.next_arrival < math.inf:
                limit = self._steps_until(self.queue.next_arrival, live_before, limit)
            steps, usage = self.space.decode(rows, limit)
            if steps:
                break
            self._preempt()
        live = live_before + rows.count * np.arange(1, steps + 1)
        durations = cost.base + cost.per_kv_token * live
        self.result.running.add(durations, live, usage, rows.count)
        if waits:
            self.result.waiting.add(durations, live, usage, rows.count)
        total = float(durations.sum())
        seconds.base += cost.base * steps
        seconds.kv += total - cost.base * steps
        self.clock += total
        rows.length += steps
        if steps == limit:
            self._finish()

    def _steps_until(self, time: float, live: int, limit: int) -> int:
        """The first of `limit` steps that ends at `time` or later."""
        durations = self.cost.base + self.cost.per_kv_token * (
            live + self.rows.count * np.arange(1, limit + 1)
        )
        ends = self.clock + durations.cumsum()
        return min(limit, int(ends.searchsorted(time)) + 1)

    def _finish(self) -> None:
        rows = self.rows
        done = rows.length == rows.final
        index = done.nonzero()[0]
        if index.size:
            self.space.release(rows, index)
            self.result.requests += index.size
            self.result.output_tokens += int(rows.output[index].sum())
            rows.drop(done)
            self._report(REPORT_EVERY)

    def _preempt(self) -> None:
        last = self.rows.count - 1
        row = last if self.victim == "newest" else last - int(self.rows.length[::-1].argmin())
        self.space.release(self.rows, np.array([row]))
        length, final, prompt, output = self.rows.take(row)
        self.queue.push_front(Job(prompt, output, final, length + 1))
        self.result.preemptions += 1
        self.result.recomputed_tokens += length

    def _report(self, least: int) -> None:
        done = self.result.requests + self.queue.refused
        if done - self._reported >= least:
            self._advance(done - self._reported)
            self._reported = done
