"""The space that pykvcache has: blocks of the real allocator, taken as sequences grow."""

from __future__ import annotations

import numpy as np

from pykvcache.allocator import BlockAllocator
from pykvcache.bench.replay.queue import Job
from pykvcache.bench.replay.rows import Int64Array, Rows
from pykvcache.bench.replay.space import Usage


class Paged:
    """Blocks of `block_size` slots.

    Args:
        slots: token slots of the memory; what is left over after whole blocks is never used.
        block_size: slots of a block.
        head_room: share of the blocks that an admission must leave free for running rows to grow.

    Raises:
        ValueError: there is no room for a block.
    """

    def __init__(self, slots: int, block_size: int, head_room: float) -> None:
        if slots < block_size:
            raise ValueError(f"block_size {block_size} is more than the budget of {slots} tokens")
        self.slots = slots
        self.block_size = block_size
        self.allocator = BlockAllocator(slots // block_size, block_size)
        self._kept_free = int(head_room * self.allocator.num_blocks)

    def holds(self, job: Job) -> bool:
        return self._blocks(job.final) <= self.allocator.num_blocks

    def admit(self, job: Job, alone: bool) -> int | None:
        needed = self._blocks(job.prefill) + (0 if alone else self._kept_free)
        if needed > self.allocator.num_free:
            return None
        return int(self.allocator.allocate((job.prefill,))[0])

    def now(self, rows: Rows) -> Usage:
        slack, last = self._ends(rows)
        used = self.allocator.num_blocks - self.allocator.num_free
        return Usage(used * self.block_size, int(slack[rows.length > last].sum()), 0)

    def decode(self, rows: Rows, limit: int) -> tuple[int, Usage]:
        room = -rows.length % self.block_size  # slots that a row has left in its last block
        takers = np.bincount(room, minlength=min(self.block_size, limit))[:limit]
        if limit > self.block_size:
            takers = np.resize(takers[: self.block_size], limit)
        taken = takers.cumsum()
        free = self.allocator.num_free
        steps = limit if taken[-1] <= free else int(taken.searchsorted(free, side="right"))
        if steps == 0:
            return 0, Usage(0, 0, 0)
        slack, last = self._ends(rows)
        # The step in which a row takes its last block, or `steps` if it does not get there.
        enters = np.minimum(np.maximum(last - rows.length, 0), steps)
        internal = np.bincount(enters, slack, steps + 1)[:steps].cumsum()
        self.allocator.append(rows.handle, steps)
        used = self.allocator.num_blocks - free + taken[:steps]
        return steps, Usage(used * self.block_size, internal, 0)

    def release(self, rows: Rows, index: Int64Array) -> None:
        self.allocator.free(rows.handle[index])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _ends(self, rows: Rows) -> tuple[Int64Array, Int64Array]:
        """Slots that a row's last block will never fill, and the tokens before that block."""
        slack = -rows.final % self.block_size
        return slack, rows.final + slack - self.block_size
