"""Shared memory of a CTA, and who touched it since the last barrier.

An element of bookkeeping ("granule") is as wide as the kernel's narrowest access. Time is counted
in barriers; within a warp also in instructions that its lanes do together (shuffles, bar.warp.sync,
ldmatrix), which order what they did before. Two accesses of one time by different threads, one of
them writing, are a race. Writing what is there already is none: threads may write the same value.

An mbarrier orders threads in a way that this bookkeeping does not follow: kernels that have one are
not searched for races, only for places that are still being written or read by copies and products.

cp.async writes when its thread waits for it; until then nobody may touch the place. wgmma reads
until it is waited for; until then nobody may write.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault

Array = NDArray[Any]
UNWRITTEN, IN_FLIGHT = -1, 1 << 30
MANY = -2


class Shared:
    def __init__(self, size: int, threads: int, granule: int) -> None:
        self.size, self.granule = size, granule
        count = -(-size // 16) * 16 // granule
        self.data = np.zeros(count * granule, np.uint8)
        self.typed = {
            width: self.data.view(dtype)
            for width, dtype in ((1, np.uint8), (2, np.uint16), (4, np.uint32), (8, np.uint64))
        }
        self.threads = np.arange(threads)
        self.warps = self.threads // 32
        self.written = np.full(count, UNWRITTEN, np.int64)  # time of the last write
        self.writer = np.zeros(count, np.int64)
        self.write_sync = np.zeros(count, np.int64)
        self.unfenced = np.zeros(count, np.int64)  # fences of the writer when it wrote
        self.read_time = np.zeros(count, np.int64)
        self.reader = np.zeros(count, np.int64)
        self.read_warp = np.zeros(count, np.int64)
        self.read_sync = np.zeros(count, np.int64)
        self.busy = np.zeros(count, np.int64)  # wgmma that read here
        self.fences = np.zeros(threads, np.int64)
        self.sync = np.zeros(threads, np.int64)  # instructions of the warp
        self.time = 1
        self.sees_races = True

    def reset(self) -> None:
        """For the next CTA: nothing is written."""
        self.data[:] = 0xA5
        self.written[:] = UNWRITTEN
        self.read_time[:] = 0
        self.busy[:] = 0
        self.fences[:] = 0
        self.sync[:] = 0
        self.time = 1

    def barrier(self) -> None:
        self.time += 1

    def warp_sync(self, mask: Any) -> None:
        if mask is True:
            self.sync += 1
        else:
            self.sync[mask] += 1

    def places(self, address: Array, size: int, mask: Any) -> tuple[Array, Array, Array]:
        """(address int64, thread, granules [threads, n]) of the active threads, checked."""
        at, thread = address.astype(np.int64), self.threads
        if mask is not True:
            at, thread = at[mask], thread[mask]
        self._check(at, thread, size)
        granules = (at // self.granule)[:, None] + np.arange(max(size // self.granule, 1))
        return at, thread, granules

    def _check(self, at: Array, thread: Array, size: int) -> None:
        outside = at > self.size - size
        if outside.any() or (at < 0).any():
            i = int(np.flatnonzero(outside | (at < 0))[0])
            raise Fault(
                f"outside: thread {thread[i]}, {size} bytes at {at[i]} of {self.size} bytes of"
                " shared memory"
            )
        if (at & (size - 1)).any():
            i = int(np.flatnonzero(at & (size - 1))[0])
            raise Fault(f"misaligned: thread {thread[i]}, {size} bytes at {at[i]} of shared memory")

    def load(self, address: Array, dtype: Any, count: int, mask: Any) -> list[Array]:
        """`count` values [active threads]."""
        width = np.dtype(dtype).itemsize
        at, thread, granules = self.places(address, width * count, mask)
        self.note_read(granules, thread[:, None])
        data, index = self.typed[width].view(dtype), at // width
        return [data[index + i] for i in range(count)]

    def store(self, address: Array, values: list[Array], mask: Any) -> None:
        """values: `count` arrays [active threads]."""
        width = values[0].dtype.itemsize
        at, thread, granules = self.places(address, width * len(values), mask)
        data, index = self.typed[width].view(values[0].dtype), at // width
        places = index[:, None] + np.arange(len(values))
        given = np.stack(values, 1)
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
        same = data[places].view(bits) == given.view(bits)
        self.note_write(granules, thread[:, None], same)
        data[places] = given
        differ = data[places].view(bits) != given.view(bits)
        if differ.any():
            i = int(np.argwhere(differ)[0][0])
            raise Fault(
                f"race: thread {thread[i]} and another one store different values to byte {at[i]}"
                " of shared memory at once"
            )

    def note_read(self, granules: Array, thread: Array) -> None:
        written = self.written[granules]
        thread = np.broadcast_to(thread, granules.shape)
        if written.min() < 0:
            self._fail(granules, thread, written < 0, "reads what nobody wrote")
        if written.max() >= self.time:
            self._fail(granules, thread, written >= IN_FLIGHT, "reads what cp.async is writing")
            writer = self.writer[granules]
            ordered = (writer // 32 == thread // 32) & (
                self.write_sync[granules] < self.sync[thread]
            )
            race = (written == self.time) & (writer != thread) & ~ordered
            self._fail(granules, thread, race, "race: reads what another thread wrote")
        self._mark_read(granules, thread)

    def _mark_read(self, granules: Array, thread: Array) -> None:
        fresh = self.read_time[granules] != self.time
        warp = thread // 32
        for owner, value in ((self.reader, thread), (self.read_warp, warp)):
            before = owner[granules]
            owner[granules] = value
            many = (owner[granules] != value) | (~fresh & (before != value))
            if many.any():
                owner[granules[many]] = MANY
        self.read_sync[granules] = self.sync[thread]
        self.read_time[granules] = np.maximum(self.read_time[granules], self.time)

    def note_write(self, granules: Array, thread: Array, same: Array | None = None) -> None:
        """`same`: values that are there already, [active threads, values]."""
        thread = np.broadcast_to(thread, granules.shape)
        self.check_write(granules, thread, same)
        self.written[granules] = self.time
        self.writer[granules] = thread
        self.write_sync[granules] = self.sync[thread]
        self.unfenced[granules] = self.fences[thread]

    def check_write(self, granules: Array, thread: Array, same: Array | None = None) -> None:
        thread = np.broadcast_to(thread, granules.shape)
        written, read = self.written[granules], self.read_time[granules]
        if written.max() >= self.time:
            self._fail(granules, thread, written >= IN_FLIGHT, "writes where cp.async is writing")
            writer = self.writer[granules]
            ordered = (writer // 32 == thread // 32) & (
                self.write_sync[granules] < self.sync[thread]
            )
            race = (written == self.time) & (writer != thread) & ~ordered
            if same is not None:
                race &= ~np.repeat(same, granules.shape[1] // same.shape[1], 1)
            self._fail(granules, thread, race, "race: writes what another thread wrote")
        if read.max() >= self.time:
            self._fail(granules, thread, read >= IN_FLIGHT, "writes what wgmma is reading")
            alike = (self.read_warp[granules] == thread // 32) & (
                (self.read_sync[granules] < self.sync[thread]) | (self.reader[granules] == thread)
            )
            race = (read == self.time) & ~alike
            if same is not None:
                race &= ~np.repeat(same, granules.shape[1] // same.shape[1], 1)
            self._fail(granules, thread, race, "race: writes what another thread reads")

    def check_fenced(self, granules: Array) -> None:
        """Before wgmma reads: writers must have fenced the asynchronous proxy since."""
        unfenced = self.fences[self.writer[granules]] <= self.unfenced[granules]
        self._fail(
            granules, self.writer[granules], unfenced,
            "wgmma reads what this thread wrote without fence.proxy.async",
        )  # fmt: skip

    def _fail(self, granules: Array, thread: Array, bad: Array, what: str) -> None:
        if not bad.any() or (what.startswith("race") and not self.sees_races):
            return
        at = tuple(np.argwhere(bad)[0])
        granule = granules[at]
        raise Fault(
            f"{what}: thread {thread[at]}, byte {granule * self.granule} of shared memory (written"
            f" by thread {self.writer[granule]}); {int(bad.sum())} such elements"
        )
