"""Replays a trace of prompts through the prefix cache and counts the blocks that it finds.

Requests come in the order of the file, one at a time. The ids of a trace stand for whole blocks, so
the allocator has blocks of one token and takes the ids for tokens. A request's hits are the blocks
at its beginning that are present; then all its blocks are, the first of them as the most recently
used. One that has more blocks than the pool is cut to the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pykvcache.allocator import BlockAllocator
from pykvcache.bench.traces import Numbers


@dataclass(frozen=True)
class Replay:
    """What a pool of `num_blocks` found; None: a pool for all distinct blocks."""

    num_blocks: int | None
    requests: int
    references: int
    hits: int
    evictions: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of the block references that were hits."""
        return self.hits / self.references if self.references else 0.0


def replay(
    requests: Sequence[Sequence[int]],
    num_blocks: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Replay:
    """Serve the requests, each a list of block ids, with a pool of `num_blocks`."""
    size = num_blocks
    if size is None:
        size = max(1, len({block for request in requests for block in request}))
    allocator = BlockAllocator(size, 1, prefix_cache=True)
    numbers = Numbers()
    prompts = [np.array([numbers[block] for block in request], np.int64) for request in requests]
    references = hits = 0
    start = time.perf_counter()
    for blocks in prompts:
        references += blocks.size
        prompt = blocks[:size]
        seqs, found = allocator.allocate_cached([prompt])
        rest = prompt[found[0] :]
        allocator.append(seqs, rest.size)
        allocator.record(seqs, rest, rest.size)
        allocator.free(seqs)
        hits += int(found[0])
        advance()
    seconds = time.perf_counter() - start
    evictions = allocator.stats().evictions
    return Replay(num_blocks, len(requests), references, hits, evictions, seconds)
