"""The scheduler: which requests take part in the next step, and with how many tokens each.

Every step runs all requests that generate (one token each) and fills what is left of the token
budget with chunks of prompts, first those that began, then new ones. When blocks run out, requests
are preempted: their blocks are given back, and they wait again for their turn.

Requests stand in one queue for everything: by arrival, where a priority of p overtakes what came up
to p * `patience` requests earlier. So nobody waits for ever, and the first of the queue is never
preempted for others, so it always ends. No tensor is seen here.

Read first: request.py, family.py, blocks.py. Read next: engine.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from pykvcache.batch import Batch, Int64Array
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.family import Family
from pykvcache.engine.queue import WaitingQueue
from pykvcache.engine.request import Lanes, Request
from pykvcache.engine.step import Options, Preemption, Step
from pykvcache.errors import OutOfBlocks

SwapOut = Callable[[Request], float | None]
Cost = Callable[[int], float]


MAX_TOKENS = 2**31 - 1  # lengths are int32
LOOKED_UP = 8192  # tokens a step that a request without room may look up in the prefix index


class Scheduler:
    """See the module. Every method leaves queue, lanes and blocks consistent, also if it raises.

    Args:
        blocks: where requests get their blocks.
        options: limits.
        swap_out: moves the blocks of a request to host memory if that is cheaper than computing
            them again; returns the seconds that it costs, None if it is not. Then the request
            still has its blocks.
        swap_in: the reverse, for a request that was opened; after OutOfBlocks it is closed.
        drop_swapped: forgets what was moved there.
        cost: estimated seconds to compute so many tokens again.
    """

    def __init__(
        self,
        blocks: RequestBlocks,
        options: Options,
        swap_out: SwapOut | None = None,
        swap_in: Callable[[Request], None] | None = None,
        drop_swapped: Callable[[Request], None] | None = None,
        cost: Cost = float,
    ) -> None:
        self.blocks, self.options = blocks, options
        self.lanes = Lanes(options.max_running)
        self.preemptions: deque[Preemption] = deque(maxlen=1000)
        self.num_preemptions = self.recomputed_tokens = self.steps = 0
        self._swap_out, self._swap_in, self._cost = swap_out, swap_in, cost
        self._drop_swapped = drop_swapped
        self._waiting = WaitingQueue()
        self._arrivals = 0
        self._allocator = blocks.allocator
        self._batch: Batch | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that have no lane."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a lane."""
        return self.lanes.num_running

    def requests(self) -> list[Request]:
        """All of them, running or waiting."""
        return [*filter(None, self.lanes.requests), *self._waiting.in_order()]

    def check(self, request: Request) -> None:
        """Refuse what could not even run alone.

        Raises:
            ValueError: the message has the numbers.
        """
        if request.limit > MAX_TOKENS:
            raise ValueError(f"a request may have {MAX_TOKENS} tokens, got {request.limit}")
        stored = request.limit - 1  # the newest token is not computed before the next is wanted
        needed = self.blocks.needed(max(stored, 1))
        if needed > self._allocator.num_blocks:
            raise ValueError(
                f"a request of {len(request.prompt)} prompt tokens, {request.limit} with its "
                f"output, needs {needed} blocks but the pool has {self._allocator.num_blocks}"
            )

    def submit(self, request: Request) -> None:
        """Put a new request into the queue; it was checked."""
        self._arrivals += 1
        request.key = self._arrivals - request.priority * self.options.patience
        request.order = self._arrivals
        self.blocks.enqueue(request)
        self._waiting.push(request)

    def finish(self, request: Request) -> None:
        """The request ends, wherever it is; its blocks are given back."""
        if request.done:
            return
        if request.lane >= 0:
            self.lanes.remove(request.lane)
        elif request.order:
            self._waiting.drop(request)
        request.done = True
        if request.swapped is not None and self._drop_swapped is not None:
            self._drop_swapped(request)
        self.blocks.close(request)

    def plan(self) -> Step | None:
        """Choose the next step and take its blocks; None when there is nothing to do.

        The rows count as computed from here on: run the step, or `undo` it.
        """
        self.steps += 1
        self.blocks.keep_rebuilt(self.lanes.computed)
        lanes, counts = self._choose(admit=True)
        while len(lanes):
            step = self._take_blocks(lanes, counts)
            if step is not None:
                return step
            lanes, counts = self._with_less(lanes, counts)
            if not len(lanes):  # all its rows were preempted: others have room now
                lanes, counts = self._choose(admit=False)
        if self.num_running or self.num_waiting:
            raise RuntimeError(
                f"no step for {self.num_running} running and {self.num_waiting} waiting requests: "
                "the scheduler has a defect"
            )
        return None

    def undo(self, step: Step) -> None:
        """The step failed: its requests wait again, as if preempted, in their old order."""
        self._undo(step.lanes)

    def _undo(self, lanes: Int64Array) -> None:
        for lane in lanes.tolist():
            request = self.lanes.requests[lane]
            if request is not None:
                self.lanes.remove(lane)
                self.blocks.discard(request)
                self._waiting.push(request)

    def preempt(self, request: Request) -> None:
        """Take the blocks of a running request; it waits for its next turn."""
        tokens = int(self.lanes.computed[request.lane])
        seconds = self._cost(tokens)
        self.lanes.remove(request.lane)
        moved: float | None = None
        try:
            moved = None if self._swap_out is None else self._swap_out(request)
        finally:
            method = "recompute" if moved is None else "swap"
            if moved is None:
                self.recomputed_tokens += tokens
                self.blocks.close(request)
            else:
                seconds = moved
            request.preemptions += 1
            self.num_preemptions += 1
            self.preemptions.append(Preemption(request.order, self.steps, tokens, method, seconds))
            self._waiting.push(request)

    # Choosing rows.

    def _choose(self, admit: bool) -> tuple[Int64Array, Int64Array]:
        """Lanes and token counts of a step that fits the budget, and by estimate the pool."""
        lanes, budget = self.lanes, self.options.token_budget
        active = lanes.active
        left = lanes.known[active] - lanes.computed[active]
        decoding = active[left == 1]
        if len(decoding) > budget:  # in turns
            decoding = decoding[np.argsort(lanes.last_step[decoding], kind="stable")[:budget]]
        budget -= len(decoding)
        size = self._allocator.block_size
        opened = int((lanes.computed[decoding] % size == 0).sum()) * self.blocks.groups
        free = self._allocator.num_free - opened
        chunks: list[tuple[int, int]] = []
        for lane in active[left > 1].tolist():
            count, free = self._chunk(lane, budget, free, bool(chunks or len(decoding)))
            budget -= count
            if count:
                chunks.append((lane, count))
        if admit:
            promised = self._promised(active[left > 1]) - self._growth(chunks)
            self._admit(chunks, budget, free, promised)
        rows = np.array([lane for lane, _ in chunks], np.int64)
        counts = np.array([count for _, count in chunks], np.int64)
        ones = np.ones(len(decoding), np.int64)
        return np.concatenate([decoding, rows]), np.concatenate([ones, counts])

    def _chunk(self, lane: int, budget: int, free: int, others: bool) -> tuple[int, int]:
        """Tokens of a prompt to compute now, and the blocks free after that."""
        lanes, request = self.lanes, self.lanes.requests[lane]
        assert request is not None
        computed = int(lanes.computed[lane])
        count = min(self.blocks.chunk_end(request, int(lanes.known[lane])) - computed, budget)
        if count <= 0:
            return 0, free
        slack = -computed % self._allocator.block_size
        room = slack + max(free, 0) // self.blocks.groups * self._allocator.block_size
        if not others:
            room = max(room, 1)  # the allocator has the last word: blocks may leave a window
        count = min(count, room)
        return count, free - self.blocks.growth(computed, count)

    def _promised(self, prefilling: Int64Array) -> int:
        """Blocks that prompts which have begun will still take."""
        lanes = self.lanes
        pairs = zip(
            lanes.computed[prefilling].tolist(), lanes.known[prefilling].tolist(), strict=True
        )
        return sum(self.blocks.growth(computed, known - computed) for computed, known in pairs)

    def _growth(self, chunks: list[tuple[int, int]]) -> int:
        computed = self.lanes.computed
        return sum(self.blocks.growth(int(computed[lane]), count) for lane, count in chunks)

    def _admit(self, chunks: list[tuple[int, int]], budget: int, free: int, promised: int) -> None:
        """Start waiting requests while budget, lanes and blocks allow; appends their chunks.

        A request whose prompt another one computes right now lets those behind it pass; one that
        finds no blocks does not.
        """
        head_room = int(self.options.head_room * self._allocator.num_blocks)
        for request in self._waiting.in_order():
            if budget <= 0 or not self.lanes.num_free:
                break
            if not self.blocks.may_open(request):
                continue
            alone = self.num_running == 0
            before, copies = self._allocator.num_free, self.blocks.copies(request)
            room = free - promised - copies - (0 if alone else head_room)
            if not self._start(request, room, alone):
                break
            self._waiting.drop(request)
            free -= before - self._allocator.num_free + copies
            left = request.length - request.computed
            count, free = self._chunk(request.lane, budget, free, not alone)
            budget -= count
            promised += self.blocks.growth(request.computed + count, left - count)
            if count:
                chunks.append((request.lane, count))

    def _start(self, request: Request, room: int, alone: bool) -> bool:
        """Place a request if `room` blocks are enough for all its tokens, or if it is alone."""
        if room < request.room_needed and self.steps < request.retry_at and not alone:
            return False
        if not self._open(request, room, alone):
            return False
        if request.swapped is not None and not self._restore(request, alone):
            return False
        self.blocks.join(request)
        if request.preemptions == 0:
            request.cached = request.computed
        self.lanes.place(request)
        return True

    def _open(self, request: Request, room: int, alone: bool) -> bool:
        """Give a request the blocks that it finds in the pool; False: the others have no room."""
        if self.blocks.inherits(request):  # it keeps its turn to do so if there is no room
            assert request.family is not None
            short = self._growth_to_end(request, request.family.length) - room
            if short > 0 and self._drop_kept(request, short, alone) < short and not alone:
                return False
            self.blocks.open(request)
            return True
        before = self._allocator.num_free
        self.blocks.open(request)  # cached blocks that it takes are no longer free
        needed = before - self._allocator.num_free
        needed += self._growth_to_end(request, request.computed)
        short = needed - room
        if short > 0 and self._drop_kept(request, short, alone) < short and not alone:
            request.room_needed = needed
            request.retry_at = self.steps + 1 + request.length // LOOKED_UP
            self.blocks.close(request)
            return False
        return True

    def _restore(self, request: Request, alone: bool) -> bool:
        """Bring back what is in host memory, or compute it again if only that helps.

        False: no room.
        """
        assert self._swap_in is not None and self._drop_swapped is not None
        try:
            self._swap_in(request)
        except OutOfBlocks:
            if not alone:
                return False
            self._drop_swapped(request)  # others hold blocks and wait
            self.blocks.open(request)
        return True

    def _growth_to_end(self, request: Request, computed: int) -> int:
        """Blocks to take until all known tokens of a request are computed."""
        tokens = request.length
        return min(self.blocks.growth(computed, tokens - computed), self.blocks.needed(tokens))

    # Taking blocks.

    def _take_blocks(self, lanes: Int64Array, counts: Int64Array) -> Step | None:
        """Grow the rows' sequences; None when the pool has not enough blocks."""
        seqs = self.lanes.seqs[lanes]
        if self._batch is None:
            windows, chunks = self.blocks.windows, self.blocks.chunks
            self._batch = self._allocator.batch(seqs, windows=windows, chunks=chunks)
        elif not np.array_equal(seqs, self._batch.seqs):
            self._batch.bind(seqs)
        try:
            copies = self._batch.step(counts)
        except OutOfBlocks:
            return None
        try:
            return self._step(lanes, counts, copies)
        except BaseException:  # the sequences have grown, but nothing will be written
            self._undo(lanes)
            raise

    def _step(self, lanes: Int64Array, counts: Int64Array, copies: list[Int64Array]) -> Step:
        """The step whose blocks were taken."""
        assert self._batch is not None
        table = self.lanes
        starts = table.computed[lanes]
        table.computed[lanes] += counts
        table.last_step[lanes] = self.steps
        ends, known, first = table.computed[lanes], table.known[lanes], table.logits_from[lanes]
        first = np.where(first < 0, known - 1, first)
        wanted = np.clip(ends - np.maximum(first, starts), 0, None)
        return Step(lanes, starts, counts, wanted, self._batch, copies)

    def _with_less(self, lanes: Int64Array, counts: Int64Array) -> tuple[Int64Array, Int64Array]:
        """A smaller step, after the pool turned out to be too full for this one."""
        chunked = counts > 1
        if chunked.any() and len(lanes) > 1:  # prompts can wait
            keep = np.ones(len(lanes), bool)
            keep[np.flatnonzero(chunked)[-1]] = False
            return lanes[keep], counts[keep]
        victim = self._victim()
        if victim is not None and self._drop_kept(victim, 1, False):
            return lanes, counts
        if victim is not None:
            keep = lanes != victim.lane
            self.preempt(victim)
            return lanes[keep], counts[keep]
        if self.blocks.kept:  # of its own, too: they may have left its window
            self.blocks.drop(self.blocks.kept[-1])
            return lanes, counts
        if counts[0] > 1:
            return lanes, np.maximum(counts // 2, 1)
        raise OutOfBlocks(
            f"the first request cannot get a block: {self._allocator.num_free} of "
            f"{self._allocator.num_blocks} are free and nothing can be preempted",
            1,
            self._allocator.num_free,
            self._allocator.num_blocks,
        )

    def _victim(self) -> Request | None:
        """The request that is cheapest to preempt among those of the lowest priority.

        Never the first of the queue.
        """
        candidates = self.lanes.active[1:]
        if not len(candidates):
            return None
        requests: list[Request] = [r for i in candidates if (r := self.lanes.requests[i])]

        def loss(request: Request) -> tuple[int, float, int]:
            tokens = int(self.lanes.computed[request.lane])
            return request.priority, self._cost(tokens), -request.order

        return min(requests, key=loss)

    def _drop_kept(self, before: Request, short: int, desperate: bool) -> int:
        """Take blocks that families keep for who waits, the last ones first; returns how many.

        Each of these families computes its beginning again, once. So nothing is taken if it would
        not make up for all the `short` blocks, nor from families that stand before `before`, nor
        where a running member has the same blocks, unless it is `desperate`.
        """
        chosen: list[Family] = []
        expected = 0
        for family in reversed(self.blocks.kept):
            if expected >= short:
                break
            if not desperate and family.rank[0] <= before.key:
                break
            if family is before.family or (family.running and not desperate):
                continue
            chosen.append(family)
            expected += self.blocks.needed(family.length)
        if expected < short and not desperate:
            return 0
        free = self._allocator.num_free
        for family in chosen:
            self.blocks.drop(family)
        return self._allocator.num_free - free
