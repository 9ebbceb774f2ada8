"""What every slot of the memory holds, over time: the data of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pykvcache.allocator import BlockAllocator
from pykvcache.bench.replay.cases import Case, make_replay
from pykvcache.bench.replay.contiguous import Contiguous
from pykvcache.bench.replay.loop import Replay
from pykvcache.bench.replay.paged import Paged
from pykvcache.bench.replay.plan import Plan
from pykvcache.bench.replay.rows import Int64Array, Rows
from pykvcache.bench.replay.space import Space
from pykvcache.bench.replay.totals import SHARES

LIVE, RESERVED, INTERNAL, ROUNDING, EXTERNAL = range(len(SHARES))
LINES, COLUMNS = 360, 240
FEWEST_SLOTS = 16  # of a picture; one slot may have many lines

Cells: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockMap:
    """cells uint8 [LINES, COLUMNS]: what a slot holds (index into SHARES), by address and time.

    Line i is the slot at i / LINES of the first `slots`, column j the moment (j + 1/2) / COLUMNS of
    `seconds`.
    """

    case: Case
    seconds: float
    slots: int
    cells: Cells

    @property
    def unit(self) -> int:
        """Slots that the axis counts as one."""
        return 1000 if self.slots >= 10_000 else 1

    @property
    def used(self) -> int:
        """The first line above which nobody ever had a slot."""
        lines = (self.cells != EXTERNAL).any(axis=1).nonzero()[0]
        return int(lines[-1]) + 1 if len(lines) else 0


class _Enough(Exception):
    """Ends a replay whose picture is complete."""


def draw_maps(plan: Plan, cases: Sequence[Case], seconds: float) -> list[BlockMap]:
    """Maps of one time and the same slots: the lowest ones, if the others are never used."""
    slots = plan.budget.slots
    while True:
        maps = [draw_map(plan, case, seconds, slots) for case in cases]
        used = max(drawn.used for drawn in maps)
        if used > LINES // 2 or slots <= FEWEST_SLOTS:
            return maps
        slots = max(FEWEST_SLOTS, -(-slots * 11 * max(1, used) // (10 * LINES)))


def draw_map(plan: Plan, case: Case, seconds: float, slots: int) -> BlockMap:
    """Replay a case as Plan.run does, for so many seconds of its own time.

    slots: how many slots to show, from address 0 on.
    """
    cells: Cells = np.full((LINES, COLUMNS), EXTERNAL, np.uint8)
    addresses = (np.arange(LINES) * slots) // LINES
    moments = (np.arange(COLUMNS) + 0.5) / COLUMNS * seconds

    def observe(start: float, end: float, rows: Rows) -> float:
        """Paint the moments from `start` to `end`; what lies between two calls stays external."""
        first, last = moments.searchsorted((start, end))
        if first < last:
            cells[:, first:last] = paint(memory, rows, addresses)[:, None]
        if last == COLUMNS:
            raise _Enough
        return float(moments[last])

    replay = make_replay(
        case, plan.workload, plan.budget.slots, plan.max_len, plan.rules, observe=observe
    )
    memory = replay.space if isinstance(replay, Replay) else replay.allocator
    with suppress(_Enough):
        replay.run()
    return BlockMap(case, seconds, slots, cells)


def paint(memory: Space | BlockAllocator, rows: Rows, addresses: Int64Array) -> Cells:
    """uint8 [A]: what the slots at `addresses` hold, as indices into SHARES."""
    if not rows.length.any():
        return np.full(len(addresses), EXTERNAL, np.uint8)
    if isinstance(memory, Contiguous):
        row, offset, asked = _find_contiguous(memory, rows, addresses)
    else:
        allocator = memory.allocator if isinstance(memory, Paged) else memory
        assert isinstance(allocator, BlockAllocator)
        row, offset, asked = _find_paged(allocator, rows, addresses)
    kinds = np.select(
        [row < 0, offset < rows.length[row], offset < rows.final[row], offset < asked],
        [EXTERNAL, LIVE, RESERVED, INTERNAL],
        ROUNDING,
    )
    return kinds.astype(np.uint8)


def _find_contiguous(
    space: Contiguous, rows: Rows, addresses: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Row of each address (-1: none), its place in the row's region, slots the row asked for."""
    regions = space.regions_of(rows)
    order = regions[:, 0].argsort()
    start, asked, granted = regions[order].T
    near = start.searchsorted(addresses, side="right") - 1
    offset = addresses - start[near]
    row = np.where((near >= 0) & (offset < granted[near]), order[near], -1)
    return row, offset, asked[near]


def _find_paged(
    allocator: BlockAllocator, rows: Rows, addresses: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The same over blocks; the place is the token's, in the longest row that has the block."""
    size, order = allocator.block_size, rows.length.argsort(kind="stable")
    table = allocator.block_table(rows.handle[order])
    holders, columns = (table >= 0).nonzero()
    blocks = table[holders, columns]
    by_block = blocks.argsort(kind="stable")
    wanted = addresses // size
    near = blocks[by_block].searchsorted(wanted, side="right") - 1
    entry = by_block[near]
    owner = np.where((near >= 0) & (blocks[entry] == wanted), order[holders[entry]], -1)
    offset = columns[entry] * size + addresses % size
    return owner, offset, np.full(len(addresses), np.iinfo(np.int64).max)
