"""Continuous batching over a space: requests join and leave at every step.

First come, first served, unless rules.py is told otherwise. A step in which requests join computes
their prompts and nothing else (prefill first); other steps give every row one token. When the rows
have no room for another token, the newest is preempted: its memory is taken back, it goes to the
front of the queue, and everything it had cached is computed again when it returns.

Steps without joining, leaving or preemption are taken together. Their durations and lengths are
known in closed form, so averages over time are those of step-by-step replay. Read next: padded.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from pykvcache.bench.replay.queue import Job, Queue
from pykvcache.bench.replay.rows import Rows
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.space import Space
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.traces import Request

Observer: TypeAlias = Callable[[float, float, Rows], float]
"""Hears of a step or a run of steps: (start, end, rows as the last step leaves them), in seconds
since the first arrival. Returns when it next wants to know: it is not called before, and steps are
not taken together beyond the first that ends then or later."""
MOST_STEPS_AT_ONCE = 4096
REPORT_EVERY = 256


class Replay:
    """One trace through one space.

    Args:
        requests: in order of arrival; none longer than the policies' max_len.
        space: where memory comes from.
        result: gets the sums.
        rules: what a step costs, when requests arrive.
        advance: called with numbers of requests that were finished or refused.
        observe: see Observer.
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
        self.queue = Queue(requests, space.holds, rules.saturated, rules.order)
        self.rows = Rows()
        self.space = space
        self.result = result
        self.cost, self.rules = rules.cost, rules
        self.clock = 0.0
        self._swapped = 0  # tokens moved since the last step
        self._advance = advance
        self._observe = observe
        self._due = math.inf if observe is None else 0.0
        self._reported = 0

    def run(self) -> Result:
        """Serve every request."""
        while True:
            admitted = self._admit()
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
            if job.swapped:
                self._swapped += job.prefill
                continue
            tokens += job.prefill
            if job.prefill == job.prompt:
                self.result.prompt_tokens += job.prompt
        self.result.peak_batch = max(self.result.peak_batch, self.rows.count)
        return tokens

    def _prefill(self, tokens: int) -> None:
        rows = self.rows
        live = int(rows.length.sum())
        duration = self.result.seconds.add_step(self.cost, live, tokens) + self._swap()
        usage = self.space.now(rows)
        waits = self.queue.head(self.clock) is not None
        window = self.result.waiting if waits else self.result.calm
        window.add(duration, live, usage, rows.count)
        self.clock += duration
        self._show(self.clock - duration)
        self._finish()

    def _decode(self) -> None:
        rows, cost, seconds = self.rows, self.cost, self.result.seconds
        most = MOST_STEPS_AT_ONCE
        while True:
            waits = self.queue.head(self.clock) is not None
            limit = min(int((rows.final - rows.length).min()), most)
            live_before = int(rows.length.sum())
            if (change := min(self.queue.next_change(), self._due)) < math.inf:
                limit = self._steps_until(change, live_before, limit)
            steps, usage = self.space.decode(rows, limit)
            if steps:
                break
            self._preempt()
            most = 1  # after this step there may be room for the preempted row
        live = live_before + rows.count * np.arange(1, steps + 1)
        durations = cost.base + cost.per_kv_token * live
        durations[0] += self._swap()
        window = self.result.waiting if waits else self.result.calm
        window.add(durations, live, usage, rows.count)
        seconds.base += cost.base * steps
        seconds.kv += cost.per_kv_token * float(live.sum())
        start = self.clock
        self.clock += float(durations.sum())
        rows.length += steps
        self._show(start)
        if steps == limit:
            self._finish()

    def _steps_until(self, time: float, live: int, limit: int) -> int:
        """The first of `limit` steps that ends at `time` or later."""
        durations = self.cost.base + self.cost.per_kv_token * (
            live + self.rows.count * np.arange(1, limit + 1)
        )
        durations[0] += self.cost.per_swapped_token * self._swapped
        ends = self.clock + durations.cumsum()
        return min(limit, int(ends.searchsorted(time)) + 1)

    def _show(self, start: float) -> None:
        if self._observe is not None and self.clock >= self._due:
            self._due = self._observe(start, self.clock, self.rows)

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
        rows, result, swap = self.rows, self.result, self.rules.preemption == "swap"
        last = rows.count - 1
        row = last if self.rules.victim == "newest" else last - int(rows.length[::-1].argmin())
        self.space.release(rows, np.array([row]))
        length, final, prompt, output = rows.take(row)
        prefill = length if swap else length + 1  # with the token that is not yet cached
        self.queue.push_front(Job(prompt, output, final, prefill, swapped=swap))
        result.preemptions += 1
        if swap:
            self._swapped += length
        else:
            result.recomputed_tokens += length

    def _swap(self) -> float:
        """Seconds that the moves since the last step take."""
        seconds = self.cost.per_swapped_token * self._swapped
        self._swapped = 0
        self.result.seconds.swap += seconds
        return seconds

    def _report(self, least: int) -> None:
        done = self.result.requests + self.queue.refused
        if done - self._reported >= least:
            self._advance(done - self._reported)
            self._reported = done
