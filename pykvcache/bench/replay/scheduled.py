"""The engine's own scheduler over the engine's own blocks, step by step, without a model.

Prompts are computed in chunks beside rows that decode, within a token budget; the cheapest row is
preempted, never the first of the queue; prefixes are shared when the trace says what they are. See
pykvcache/engine/scheduler.py. Where loop.py replays the policy that all spaces have in common, this
one shows what `pykvcache.Engine` does with the same trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from pykvcache.allocator import BlockAllocator
from pykvcache.batch import Int64Array
from pykvcache.bench.replay.loop import MOST_STEPS_AT_ONCE, REPORT_EVERY, Observer
from pykvcache.bench.replay.queue import Job, Queue
from pykvcache.bench.replay.rows import Rows
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.space import Usage
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.traces import PREFIX_BLOCK, Numbers, Request
from pykvcache.engine import request as engine
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.family import Family
from pykvcache.engine.scheduler import Scheduler
from pykvcache.engine.step import Options, Step

LOOKAHEAD = 256  # requests that the scheduler sees, so that the queue of a long trace stays short


class ScheduledReplay:
    """One trace through the engine's scheduler. Args: see loop.Replay."""

    def __init__(
        self,
        requests: Iterable[Request],
        slots: int,
        block_size: int,
        result: Result,
        rules: Rules,
        advance: Callable[[int], object] = lambda count: None,
        observe: Observer | None = None,
    ) -> None:
        self.allocator = BlockAllocator(
            slots // block_size, block_size, prefix_cache=rules.prefix_cache
        )
        self.blocks = RequestBlocks(self.allocator, prefix_cache=rules.prefix_cache)
        options = Options(rules.token_budget, rules.max_running, rules.head_room)
        self.scheduler = Scheduler(self.blocks, options)
        self.lanes = self.scheduler.lanes
        self.queue = Queue(requests, self._holds, rules.saturated, rules.order)
        self.result, self.cost = result, rules.cost
        self.clock = 0.0
        self._prefixes, self._numbers = rules.prefix_cache, Numbers()
        self._advance, self._observe = advance, observe
        self._due = math.inf if observe is None else 0.0
        self._submitted = self._reported = 0

    def run(self) -> Result:
        """Serve every request."""
        result, scheduler = self.result, self.scheduler
        while True:
            self._submit()
            preempted = scheduler.num_preemptions
            step = scheduler.plan()
            if step is not None:
                self._count(step)
                self._settle(step)
                if scheduler.num_preemptions == preempted and not self._prefixes:
                    self._repeat(step)
            elif self.queue.next_arrival < math.inf:
                result.seconds.idle += self.queue.next_arrival - self.clock
                self.clock = self.queue.next_arrival
            else:
                break
        result.refused = self.queue.refused
        result.preemptions = scheduler.num_preemptions
        result.recomputed_tokens = scheduler.recomputed_tokens
        self._report(1)
        return result

    def _holds(self, job: Job) -> bool:
        return self.blocks.needed(job.final) <= self.allocator.num_blocks

    def _submit(self) -> None:
        while self.scheduler.num_waiting < LOOKAHEAD:
            job = self.queue.head(self.clock)
            if job is None:
                return
            self.queue.pop()
            self._submitted += 1
            request = engine.Request(self._tokens(job), job.prompt + job.output, 0, 0)
            request.family = Family(None, job.prompt)  # of nobody else
            self.scheduler.submit(request)

    def _tokens(self, job: Job) -> Int64Array:
        """Token ids of a prompt: one for each block of its prefix, its own for the rest."""
        if not self._prefixes:
            return np.zeros(job.prompt, np.int64)
        ids = np.full(job.prompt, -2 * self._submitted - 1)
        numbers = np.array([self._numbers[block] for block in job.prefix], np.int64)
        known = np.repeat(numbers, PREFIX_BLOCK)[: job.prompt]
        ids[: len(known)] = known
        return ids

    def _count(self, step: Step) -> None:
        """Add the time of a step, and what the pool holds in it."""
        result, lanes, active = self.result, self.lanes, self.lanes.active
        cached = lanes.computed[active]
        chunks = step.counts[step.counts > 1]
        parts = result.seconds.add_step(self.cost, int(cached.sum()), int(chunks.sum()))
        size = self.allocator.block_size
        allocated = (self.allocator.num_blocks - self.allocator.num_free) * size
        room = cached + -cached % size
        reserved = int((np.minimum(lanes.limit[active] - 1, room) - cached).sum())
        live = self.allocator.stats().live if self._prefixes else int(cached.sum())
        usage = Usage(allocated, max(0, allocated - live - reserved), 0)
        waits = self.scheduler.num_waiting or self.queue.head(self.clock) is not None
        window = result.waiting if waits else result.calm
        window.add(parts, live, usage, len(active))
        result.peak_batch = max(result.peak_batch, len(active))
        self.clock += parts
        self._show(self.clock - parts)

    def _show(self, start: float) -> None:
        if self._observe is not None and self.clock >= self._due:
            lanes, active = self.lanes, self.lanes.active
            rows = Rows.of(lanes.computed[active], lanes.limit[active] - 1, lanes.seqs[active])
            self._due = self._observe(start, self.clock, rows)

    def _settle(self, step: Step) -> None:
        """What the engine does after a forward: record, give each row its token, end rows."""
        lanes = self.lanes
        if self._prefixes:
            ids = lanes.ids(step.lanes, step.starts, step.counts)
            self.blocks.record(lanes.seqs[step.lanes], ids, step.counts)
        rows = step.lanes[step.wanted > 0]
        lanes.append(rows, -2 * lanes.key[rows])  # of nobody else: keys are orders here
        self._end(rows)

    def _repeat(self, step: Step) -> None:
        """Take the next steps together if all are like this one: one token for every row.

        A request that found no room in `step` finds none before a row ends, since the free blocks
        become fewer. Whoever arrives ends the run, and so does a step without enough blocks.
        """
        active, change = self.lanes.active, self._due
        if self.scheduler.num_waiting < LOOKAHEAD:
            change = min(change, self.queue.next_change())
        decoded = step.counts.max() == 1 == step.wanted.min()
        if not decoded or not len(active) == len(step.lanes) > 0 or change <= self.clock:
            return
        start = self.clock
        if steps := self._run(active, change):
            self.allocator.append(self.lanes.seqs[active], steps)
            self.lanes.skip(active, steps)
            self._show(start)
            self._end(active)

    def _run(self, active: Int64Array, change: float) -> int:
        """Count decodes of all rows, to the first that ends at `change` or later; how many."""
        lanes, result, cost, size = self.lanes, self.result, self.cost, self.allocator.block_size
        steps = min(int((lanes.limit[active] - lanes.known[active]).min()), MOST_STEPS_AT_ONCE)
        cached = lanes.computed[active] + np.arange(1, steps + 1)[:, None]  # [steps, B]
        room = cached + -cached % size
        live, allocated = cached.sum(axis=1), room.sum(axis=1)
        durations = cost.base + cost.per_kv_token * live
        ends = self.clock + durations.cumsum()
        held = int(allocated.searchsorted(self.allocator.num_blocks * size, side="right"))
        steps = min(held, int(ends.searchsorted(change)) + 1)
        if steps:
            reserved = (np.minimum(lanes.limit[active] - 1, room) - cached).sum(axis=1)
            internal = allocated - live - reserved
            waits = self.scheduler.num_waiting or self.queue.head(self.clock) is not None
            usage = Usage(allocated[:steps], internal[:steps], 0)
            window = result.waiting if waits else result.calm
            window.add(durations[:steps], live[:steps], usage, len(active))
            result.seconds.base += cost.base * steps
            result.seconds.kv += cost.per_kv_token * float(live[:steps].sum())
            self.clock = float(ends[steps - 1])
        return steps

    def _end(self, rows: Int64Array) -> None:
        """Take out those of `rows` that have all their tokens."""
        lanes = self.lanes
        for row in rows[lanes.known[rows] >= lanes.limit[rows]].tolist():
            request = lanes.requests[row]
            assert request is not None
            self.scheduler.finish(request)
            self.result.requests += 1
            self.result.prompt_tokens += len(request.prompt)
            self.result.hit_tokens += request.cached
            self.result.output_tokens += request.limit - len(request.prompt)
        self._report(REPORT_EVERY)

    def _report(self, least: int) -> None:
        done = self.result.requests + self.queue.refused
        if done - self._reported >= least:
            self._advance(done - self._reported)
            self._reported = done
