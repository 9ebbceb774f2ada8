"""Allocators of contiguous regions: fixed slots, first fit, and buddies."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Protocol


class Regions(Protocol):
    """Hands out regions of an address space of `size` slots."""

    def granted(self, size: int) -> int:
        """Slots that a region for `size` slots takes."""

    def largest(self) -> int:
        """The most slots of one region in empty memory."""

    def take(self, size: int) -> int | None:
        """Address of a new region, or None if there is none."""

    def give(self, address: int, size: int) -> None:
        """Return a region, named by the size it was taken for."""


class FixedSlots:
    """Equal regions of `width` slots; what is left at the end of the memory is never used."""

    def __init__(self, size: int, width: int) -> None:
        self._width = width
        self._free = [i * width for i in reversed(range(size // width))]
        self._any = bool(self._free)

    def granted(self, size: int) -> int:
        return size

    def largest(self) -> int:
        return self._width if self._any else 0

    def take(self, size: int) -> int | None:
        return self._free.pop() if self._free else None

    def give(self, address: int, size: int) -> None:
        self._free.append(address)


class FirstFit:
    """Regions of any size at the lowest address where they fit; neighbouring holes merge."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._holes = [(0, size)]  # (address, slots), by address

    def granted(self, size: int) -> int:
        return size

    def largest(self) -> int:
        return self._size

    def take(self, size: int) -> int | None:
        for i, (address, slots) in enumerate(self._holes):
            if slots >= size:
                if slots == size:
                    del self._holes[i]
                else:
                    self._holes[i] = (address + size, slots - size)
                return address
        return None

    def give(self, address: int, size: int) -> None:
        i = bisect_left(self._holes, (address, 0))
        if i < len(self._holes) and self._holes[i][0] == address + size:
            size += self._holes.pop(i)[1]
        if i and sum(self._holes[i - 1]) == address:
            address, before = self._holes.pop(i - 1)
            size += before
            i -= 1
        self._holes.insert(i, (address, size))


class Buddies:
    """Knuth's buddy system (The Art of Computer Programming, vol. 1, 2.5, algorithms R and S).

    The memory is cut into top regions, and what is left at its end into ever smaller powers of two.
    A region has a power of two of slots and lies at a multiple of its size; the lowest free one of
    the smallest sufficient size is taken.

    Args:
        size: slots of the memory.
        longest: the most slots that anyone asks for. Top regions are the power of two that holds
            it, or the largest that the memory has.
        whole: if false, a rest of less than `longest` slots is not used, as with FixedSlots.
    """

    def __init__(self, size: int, longest: int, whole: bool) -> None:
        self._top = min((longest - 1).bit_length(), size.bit_length() - 1)
        self._free: list[list[int]] = [[] for _ in range(self._top + 1)]
        self._free[self._top] = [i << self._top for i in range(size >> self._top)]
        start = size >> self._top << self._top
        if whole or size - start >= longest:
            for order in reversed(range(self._top)):
                if size - start >= 1 << order:
                    self._free[order].append(start)
                    start += 1 << order

    def granted(self, size: int) -> int:
        return 1 << (size - 1).bit_length()

    def largest(self) -> int:
        return 1 << self._top

    def take(self, size: int) -> int | None:
        wanted = (size - 1).bit_length()
        for order in range(wanted, self._top + 1):
            if self._free[order]:
                address = self._free[order].pop(0)
                while order > wanted:
                    order -= 1
                    insort(self._free[order], address + (1 << order))
                return address
        return None

    def give(self, address: int, size: int) -> None:
        order = (size - 1).bit_length()
        while order < self._top:
            free, buddy = self._free[order], address ^ (1 << order)
            i = bisect_left(free, buddy)
            if i == len(free) or free[i] != buddy:
                break
            del free[i]
            address = min(address, buddy)
            order += 1
        insort(self._free[order], address)
