"""A padded batch, as `model.generate` runs it: rows begin together and leave together.

The batch is the longest beginning of the queue that fits when every row has the slots of the
longest prompt and the longest output in it. That needs the outputs to be known, so it is the best
that anyone can do who has to choose a batch size. The cache grows by one slot a row and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pykvcache.bench.replay.queue import Job, Queue
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.space import Usage
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.traces import Request


class PaddedReplay:
    """One trace through padded batches.

    Args: see loop.Replay. `slots` are those of the memory.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        slots: int,
        result: Result,
        rules: Rules,
        advance: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.queue = Queue(requests, lambda job: job.final <= slots, rules.saturated, rules.order)
        self.slots = slots
        self.result = result
        self.cost = rules.cost
        self.clock = 0.0
        self._advance = advance

    def run(self) -> Result:
        """Serve every request."""
        refused = 0
        while self.queue.next_arrival < math.inf:
            if self.queue.next_arrival > self.clock:
                self.result.seconds.idle += self.queue.next_arrival - self.clock
                self.clock = self.queue.next_arrival
            batch = self._next_batch()
            self._run_batch(batch)
            self._advance(len(batch) + self.queue.refused - refused)
            refused = self.queue.refused
        self.result.refused = refused
        return self.result

    def _next_batch(self) -> list[Job]:
        batch: list[Job] = []
        prompt = output = 0
        while (job := self.queue.head(self.clock)) is not None:
            prompt, output = max(prompt, job.prompt), max(output, job.output)
            if (len(batch) + 1) * (prompt + output - 1) > self.slots:
                break
            batch.append(self.queue.pop())
        return batch

    def _run_batch(self, batch: list[Job]) -> None:
        """The prefill and all decode steps; step 0 is the prefill."""
        cost, result, rows = self.cost, self.result, len(batch)
        prompts = np.array([job.prompt for job in batch])
        outputs = np.array([job.output for job in batch])
        steps = np.arange(outputs.max())
        allocated = rows * (prompts.max() + steps)
        # A row generates in the steps before outputs[row]; sums over rows, from the last step back.
        active = np.bincount(outputs - 1)[::-1].cumsum()[::-1]
        active_prompts = np.bincount(outputs - 1, prompts)[::-1].cumsum()[::-1]
        live = active_prompts + active * steps

        kv = cost.per_kv_token * allocated  # padding is read like everything else
        durations = cost.base + kv
        prefill = cost.per_prefill_token * int(allocated[0])
        durations[0] += prefill
        self._count(durations, live, Usage(allocated, allocated - live, 0), active)

        result.seconds.base += cost.base * len(steps)
        result.seconds.kv += float(kv.sum())
        result.seconds.prefill += prefill
        result.requests += rows
        result.output_tokens += int(outputs.sum())
        result.prompt_tokens += int(prompts.sum())
        result.peak_batch = max(result.peak_batch, rows)
        self.clock += float(durations.sum())

    def _count(
        self,
        durations: NDArray[np.float64],
        live: NDArray[np.int64],
        usage: Usage,
        active: NDArray[np.int64],
    ) -> None:
        starts = self.clock + durations.cumsum() - durations
        waits = starts >= self.queue.next_arrival
        assert not isinstance(usage.allocated, int) and not isinstance(usage.internal, int)
        for window, steps in ((self.result.waiting, waits), (self.result.calm, ~waits)):
            part = Usage(usage.allocated[steps], usage.internal[steps], 0)
            window.add(durations[steps], live[steps], part, active[steps])
