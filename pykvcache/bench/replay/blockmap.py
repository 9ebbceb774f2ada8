"""What every slot of the memory holds, over time: the data of a picture."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pykvcache.bench.replay.cases import Case, make_space
from pykvcache.bench.replay.contiguous import Contiguous
from pykvcache.bench.replay.loop import Replay
from pykvcache.bench.replay.paged import Paged
from pykvcache.bench.replay.plan import Plan
from pykvcache.bench.replay.rows import Int64Array, Rows
from pykvcache.bench.replay.totals import SHARES, Result

LIVE, RESERVED, INTERNAL, ROUNDING, EXTERNAL = range(len(SHARES))
LINES, COLUMNS = 360, 240

Cells: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockMap:
    """cells uint8 [LINES, COLUMNS]: what a slot holds (index into SHARES), by address and time.

    Line i shows the slot at i / LINES of the memory, column j the moment j / COLUMNS * seconds.
    """

    case: Case
    seconds: float
    cells: Cells


class _Enough(Exception):
    """Ends a replay whose picture is complete."""


def draw_map(plan: Plan, case: Case, seconds: float) -> BlockMap:
    """Replay a case from its start for so many seconds of its own time."""
    slots = plan.budget.slots
    space = make_space(case, slots, plan.max_len, plan.rules.head_room)
    assert isinstance(space, (Paged, Contiguous))
    addresses = (np.arange(LINES) * slots) // LINES
    cells: Cells = np.full((LINES, COLUMNS), EXTERNAL, np.uint8)
    drawn = 0

    def observe(clock: float, rows: Rows) -> None:
        """The state from here on, up to the next call; earlier columns are drawn already."""
        nonlocal drawn
        column = min(COLUMNS, int(clock / seconds * COLUMNS))
        cells[:, drawn:column] = cells[:, [max(drawn - 1, 0)]]
        drawn = max(drawn, column)
        if drawn >= COLUMNS:
            raise _Enough
        cells[:, drawn] = paint(space, rows, addresses)
        drawn += 1

    result = Result(case.policy, case.block_size, slots)
    with suppress(_Enough):
        Replay(plan.workload, space, result, plan.rules, observe=observe).run()
    return BlockMap(case, seconds, cells)


def paint(space: Paged | Contiguous, rows: Rows, addresses: Int64Array) -> Cells:
    """uint8 [A]: what the slots at `addresses` hold, as indices into SHARES."""
    if rows.count == 0:
        return np.full(len(addresses), EXTERNAL, np.uint8)
    find = _find_paged if isinstance(space, Paged) else _find_contiguous
    row, offset, asked = find(space, rows, addresses)  # type: ignore[arg-type]
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
    space: Paged, rows: Rows, addresses: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The same over blocks; the place is that of the token."""
    size, table = space.block_size, space.allocator.block_table(rows.handle)
    owner = np.full(space.allocator.num_blocks + 1, -1)
    place = np.zeros(len(owner), np.int64)
    holders, columns = (table >= 0).nonzero()
    blocks = table[holders, columns]
    owner[blocks], place[blocks] = holders, columns
    block = np.minimum(addresses // size, space.allocator.num_blocks)  # the last stands for none
    offset = place[block] * size + addresses % size
    return owner[block], offset, np.full(len(addresses), np.iinfo(np.int64).max)
