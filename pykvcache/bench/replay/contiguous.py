"""Spaces that give each request one region, of a size chosen at admission and kept to the end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pykvcache.bench.replay.queue import Job
from pykvcache.bench.replay.regions import Buddies, FirstFit, FixedSlots, Regions
from pykvcache.bench.replay.rows import Int64Array, Rows
from pykvcache.bench.replay.space import Usage


class Contiguous:
    """One region a row.

    Args:
        slots: token slots of the memory.
        regions: the allocator of regions in it.
        ask: the slots that the policy reserves for a job, at least `job.final`.
    """

    def __init__(self, slots: int, regions: Regions, ask: Callable[[Job], int]) -> None:
        self.slots = slots
        self._regions = regions
        self._ask = ask
        self._sizes: dict[int, tuple[int, int]] = {}  # address -> (slots asked for, final)
        self._allocated = self._internal = self._rounding = 0

    def holds(self, job: Job) -> bool:
        return self._ask(job) <= self._regions.largest()

    def admit(self, job: Job, alone: bool) -> int | None:
        size = self._ask(job)
        address = self._regions.take(size)
        if address is not None:
            self._sizes[address] = size, job.final
            self._count(size, job.final, 1)
        return address

    def now(self, rows: Rows) -> Usage:
        return Usage(self._allocated, self._internal, self._rounding)

    def decode(self, rows: Rows, limit: int) -> tuple[int, Usage]:
        return limit, self.now(rows)

    def release(self, rows: Rows, index: Int64Array) -> None:
        for address in rows.handle[index].tolist():
            size, final = self._sizes.pop(address)
            self._regions.give(address, size)
            self._count(size, final, -1)

    def regions_of(self, rows: Rows) -> Int64Array:
        """int64 [B, 3]: address, slots asked for, slots granted."""
        sizes = [self._sizes[address][0] for address in rows.handle.tolist()]
        granted = [self._regions.granted(size) for size in sizes]
        return np.stack([rows.handle, np.array(sizes), np.array(granted)], axis=1)

    def _count(self, size: int, final: int, sign: int) -> None:
        granted = self._regions.granted(size)
        self._allocated += sign * granted
        self._internal += sign * (size - final)
        self._rounding += sign * (granted - size)


def max_length(slots: int, max_len: int, whole: bool) -> Contiguous:
    """Every request gets `max_len` slots."""
    return Contiguous(slots, FixedSlots(slots, max_len), lambda job: max_len)


def power_of_two(slots: int, max_len: int, whole: bool) -> Contiguous:
    """The prompt, and the output rounded up to a power of two; never more than `max_len`."""
    return Contiguous(
        slots,
        Buddies(slots, max_len, whole),
        lambda job: min(job.prompt + (1 << (job.output - 1).bit_length()), max_len),
    )


def oracle_first_fit(slots: int, max_len: int, whole: bool) -> Contiguous:
    """Exactly what the request will need, at the first address where it fits."""
    return Contiguous(slots, FirstFit(slots), lambda job: job.final)


def oracle_buddy(slots: int, max_len: int, whole: bool) -> Contiguous:
    """Exactly what the request will need, from a buddy allocator."""
    return Contiguous(slots, Buddies(slots, max_len, whole), lambda job: job.final)
