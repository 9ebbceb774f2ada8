"""What the block allocator costs, goal beside measured.

"in C++" is a loop with a clock inside the extension (csrc/allocator/timing.cpp), over a worn pool,
or for the prefix cache over a pool that is all cached (timing_prefix.cpp);
"call" is one call from Python on that many blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from pykvcache.allocator import BlockAllocator
from pykvcache.bench.compare import duration
from pykvcache.bench.timing import Timing, interleave

BLOCK_SIZE, LENGTH, ROWS = 16, 1000, 256
MOST_LENGTH = 8 * LENGTH

GOALS = {
    "init, a pool": 60e-3,
    "allocate, a block": 10e-9,
    "free, a block": 10e-9,
    "append to 256 sequences": 5e-6,
    "step of 256 sequences": 5e-6,
    "fork of 1,000 tokens": 0.5e-6,
    "prefix hit, a block": 100e-9,
    "record 1 token of 256 sequences": 5e-6,
    "evict + allocate, a block": 250e-9,
    "batch.step(), 1 row": 3e-6,
    "batch.step(), 256 rows": 8e-6,
    "the extension's append alone": 0.3e-6,
    "the extension's num_free alone": 0.15e-6,
}


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds."""

    where: str
    operation: str
    timing: Timing
    goal: float | None


class Pool:
    """What the calls from Python work on."""

    def __init__(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
        self.one = self.allocator.allocate([LENGTH])
        self.handle = (int(self.one[0]),)
        self.many = self.allocator.allocate([LENGTH] * ROWS)
        columns = -(-MOST_LENGTH // BLOCK_SIZE)
        self.batches = {
            seqs.size: self.allocator.batch(seqs, columns=columns) for seqs in (self.one, self.many)
        }
        self.core = self.allocator._core
        self.prompt = np.arange(LENGTH)
        self.cached = BlockAllocator(num_blocks, BLOCK_SIZE, prefix_cache=True)
        seqs = self.cached.allocate([LENGTH])
        self.cached.record(seqs, self.prompt, LENGTH)
        self.cached.free(seqs)
        self.lengths = dict.fromkeys(self.batches, LENGTH)

    def step(self, rows: int) -> None:
        """A decode step; sequences are cut back before they fill the table."""
        batch = self.batches[rows]
        self.lengths[rows] += 1
        if self.lengths[rows] == MOST_LENGTH:
            self.allocator.truncate(batch.seqs, LENGTH)
            self.lengths[rows] = LENGTH
        batch.step()


CALLS: dict[str, Callable[[Pool], Any]] = {
    "batch.step(), 1 row": lambda pool: pool.step(1),
    "batch.step(), 256 rows": lambda pool: pool.step(ROWS),
    "append(), 1 row": lambda pool: pool.allocator.append(pool.one, 0),
    "fork() + free(), 1,000 tokens": lambda pool: pool.allocator.free(
        pool.allocator.fork(pool.one)
    ),
    "allocate() + free(), 1,000 tokens": lambda pool: pool.allocator.free(
        pool.allocator.allocate([LENGTH])
    ),
    "allocate_cached() + free(), 1,000 tokens": lambda pool: pool.cached.free(
        pool.cached.allocate_cached([pool.prompt])[0]
    ),
    "lengths(), 256 rows": lambda pool: pool.allocator.lengths(pool.many),
    "block_table(), 256 rows": lambda pool: pool.allocator.block_table(pool.many),
    "the extension's append alone": lambda pool: pool.core.append(pool.handle, 0),
    "the extension's num_free alone": lambda pool: pool.core.num_free(),
}


def time_inside(num_blocks: int, repeats: int) -> list[Row]:
    """Operations timed in C++."""
    from pykvcache import _C

    rows = []
    inside = _C.time_allocator(num_blocks, repeats) | _C.time_prefixes(num_blocks, repeats)
    for operation, nanoseconds in inside.items():
        timing = Timing.of([ns * 1e-9 for ns in nanoseconds])
        rows.append(Row("in C++", operation, timing, GOALS.get(operation)))
    return rows


def time_calls(num_blocks: int, seconds: float) -> list[Row]:
    """Operations timed from Python."""
    pool = Pool(num_blocks)

    def contender(call: Callable[[Pool], Any]) -> Callable[[int], Any]:
        return lambda number: call(pool)

    timings = interleave({name: contender(call) for name, call in CALLS.items()}, seconds)
    return [Row("call", name, timing, GOALS.get(name)) for name, timing in timings.items()]


def allocator_table(rows: list[Row], num_blocks: int) -> Table:
    """Median and spread of each operation beside its goal."""
    title = f"block allocator, {num_blocks:,} blocks of {BLOCK_SIZE} tokens, one core"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("where", "operation"):
        table.add_column(column)
    for column in ("goal", "median", "p10", "p90"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        met = "" if row.goal is None else "met" if row.timing.median <= row.goal else "missed"
        spread = (row.timing.median, row.timing.p10, row.timing.p90)
        table.add_row(row.where, row.operation, duration(row.goal), *map(duration, spread), met)
    return table
