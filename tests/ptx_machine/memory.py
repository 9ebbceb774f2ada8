"""Global memory: the tensors of a launch and nothing else.

Every storage lies at a made-up address far from the others and beyond 32 bits, as aligned as it is
here. An access has to lie within one of the views that were passed, not in the gaps of a strided
one, and at a multiple of its width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault
from torch import Tensor

Array = NDArray[Any]
SPACING = 1 << 38  # bytes between two storages
FIRST = 0x10_0000_0000_0000
ALIGNMENT = 64  # an address is like the real one modulo this


@dataclass(frozen=True)
class View:
    """A tensor in a storage, in bytes from the storage's begin."""

    name: str
    begin: int
    end: int
    run: int  # contiguous bytes at the innermost
    strides: tuple[tuple[int, int], ...]  # (stride, size) of the rest, from the largest
    description: str

    def holds(self, offset: Array, size: int) -> Array:
        """Which accesses of `size` bytes at `offset` int64 lie within."""
        rest = offset - self.begin
        inside = (rest >= 0) & (rest <= self.end - self.begin - size)
        for stride, count in self.strides:
            index = rest // stride
            inside &= index < count
            rest = rest - index * stride
        return inside & (rest + size <= self.run) if self.strides else inside


@dataclass
class Storage:
    base: int
    size: int
    data: Array  # uint8
    views: list[View] = field(default_factory=list)
    typed: dict[Any, Array] = field(default_factory=dict)

    def seen_as(self, dtype: Any) -> Array:
        if dtype not in self.typed:
            width = np.dtype(dtype).itemsize
            self.typed[dtype] = self.data[: self.size // width * width].view(dtype)
        return self.typed[dtype]


class Memory:
    """Addresses for tensors; loads and stores of many threads."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self._known: dict[int, Storage] = {}
        self._keep: list[Tensor] = []

    def register(self, tensor: Tensor, name: str) -> int:
        """The address of a tensor's first element."""
        self._keep.append(tensor)
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        begin = tensor.storage_offset() * tensor.element_size()
        if not storage.nbytes():
            return 0
        if pointer not in self._known:
            base = FIRST + len(self.storages) * SPACING + pointer % ALIGNMENT
            raw = (ctypes.c_uint8 * storage.nbytes()).from_address(pointer)
            known = Storage(base, storage.nbytes(), np.frombuffer(raw, np.uint8))
            self._known[pointer] = known
            self.storages.append(known)
        known = self._known[pointer]
        view = view_of(tensor, name, begin)
        if view not in known.views and tensor.numel():
            known.views.append(view)
        return known.base + begin

    def register_bytes(self, values: Array, name: str) -> int:
        """Constants of a module."""
        data = np.ascontiguousarray(values).view(np.uint8)
        storage = Storage(FIRST + len(self.storages) * SPACING, data.size, data)
        storage.views.append(View(name, 0, data.size, data.size, (), name))
        self.storages.append(storage)
        return storage.base

    def locate(
        self, address: Array, size: int, mask: Any, aligned: bool = True
    ) -> list[tuple[Storage, Array, Any]]:
        """(storage, offset int64 [threads], threads) of accesses of `size` bytes, each checked."""
        active = address if mask is True else address[mask]
        if aligned and (active & np.uint64(size - 1)).any():
            bad = (address & np.uint64(size - 1)) != 0
            self._fail(address, size, bad if mask is True else bad & mask, "misaligned")
        found, left = [], mask
        while True:
            first = int(active[0])
            number = (first - FIRST + SPACING // 2) // SPACING  # the nearest one
            if not 0 <= number < len(self.storages):
                only = address == np.uint64(first)
                self._fail(address, size, only if left is True else only & left, "outside")
            storage = self.storages[number]
            offset = (address - np.uint64(storage.base)).view(np.int64)
            inside = storage.views[0].holds(offset, size)
            for view in storage.views[1:]:
                if inside.all():
                    break
                inside = inside | view.holds(offset, size)
            near = (offset >= -(SPACING // 2)) & (offset < SPACING // 2)
            if left is not True:
                near &= left
            if (near & ~inside).any():
                self._fail(address, size, near & ~inside, "outside")
            all_near = near.all() if left is True else not (left & ~near).any()
            here = left if all_near else near
            if here is not True:
                offset = np.where(here, offset, 0)
            found.append((storage, offset, here))
            if all_near:
                return found
            left = ~near if left is True else left & ~near
            active = address[left]

    def load(self, address: Array, dtype: Any, count: int, mask: Any) -> list[Array]:
        """`count` values [threads] of consecutive addresses; 0 for threads not in mask."""
        width = np.dtype(dtype).itemsize
        places = self.locate(address, width * count, mask)
        if len(places) == 1:
            storage, offset, _ = places[0]
            data, index = storage.seen_as(dtype), offset // width
            return [data[index + i] for i in range(count)]
        values = [np.zeros(address.shape, dtype) for _ in range(count)]
        for storage, offset, here in places:
            data, index = storage.seen_as(dtype), offset // width
            for i in range(count):
                values[i][here] = data[index[here] + i]
        return values

    def load_bytes(self, address: Array, count: int, mask: Array) -> Array:
        """uint8 [active threads, count] of any number of bytes, in bounds; alignment is not looked
        at."""
        active = np.zeros((int(mask.sum()), count), np.uint8)
        for i in range(count if count & (count - 1) else 1):
            step = count if not count & (count - 1) else 1
            for storage, offset, here in self.locate(
                address + np.uint64(i), step, mask, aligned=False
            ):
                chosen = offset[here]
                places = chosen[:, None] + np.arange(step)
                active[np.broadcast_to(here, mask.shape)[mask], i : i + step] = storage.data[places]
        return active

    def store(self, address: Array, values: list[Array], mask: Any) -> None:
        dtype = values[0].dtype
        width = dtype.itemsize
        for storage, offset, here in self.locate(address, width * len(values), mask):
            data, index = storage.seen_as(dtype), offset // width
            for i, value in enumerate(values):
                if here is True:
                    data[index + i] = value
                else:
                    data[index[here] + i] = value[here]

    def _fail(self, address: Array, size: int, bad: Array, what: str) -> None:
        thread = int(np.flatnonzero(bad)[0])
        where = int(address[thread])
        raise Fault(
            f"{what}: thread {thread}, {size} bytes at {where:#x}, {self.nearest(where)};"
            f" {int(bad.sum())} threads do so"
        )

    def nearest(self, address: int) -> str:
        views = [(s.base + v.begin, s.base + v.end, v) for s in self.storages for v in s.views]
        if not views:
            return "no tensor was passed"
        begin, end, view = min(views, key=lambda v: max(v[0] - address, address - v[1], 0))
        if begin <= address < end:
            return f"byte {address - begin} of {view.name} {view.description}"
        after = address >= end
        distance = address - end if after else begin - address
        side = "after" if after else "before"
        return f"{distance} bytes {side} {view.name} {view.description}"


def view_of(tensor: Tensor, name: str, begin: int) -> View:
    """Dimensions that lie side by side are one; only nested ones are told apart."""
    width = tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    dims = sorted((stride * width, size) for stride, size in pairs if size > 1 and stride)
    run, rest = width, []
    for stride, size in dims:
        if stride <= run and not rest:
            run = max(run, stride * (size - 1) + run)
        else:
            rest.append((stride, size))
    reach, nested = run, True
    for stride, size in rest:
        nested &= stride >= reach
        reach += stride * (size - 1)
    if not nested:
        run, rest = reach, []
    description = f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
    return View(name, begin, begin + reach, run, tuple(reversed(rest)), description)
