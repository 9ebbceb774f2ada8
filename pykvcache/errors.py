"""Errors of the block allocator. Each one leaves the allocator as it was.

csrc/allocator/binding.cpp raises them; bad arguments are ValueError and TypeError instead.
"""

from __future__ import annotations


class AllocatorError(RuntimeError):
    """Base of all errors that the state of an allocator causes."""


class OutOfBlocks(AllocatorError):
    """The pool has not enough free blocks.

    Attributes: `needed` new blocks were asked for, `free` of `total` blocks are free.
    """

    def __init__(self, message: str, needed: int = 0, free: int = 0, total: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free
        self.total = total


class DoubleFree(AllocatorError):
    """A sequence was freed twice, or a block unpinned more often than it was pinned."""


class UnknownSequence(AllocatorError):
    """The handle is of another allocator, or of a sequence that is gone."""


class UnknownBlock(AllocatorError):
    """The block id is outside the pool, or of a free block."""


class IntegrityError(AllocatorError):
    """check_integrity() found references, tables and free list in disagreement."""


class SnapshotError(AllocatorError):
    """The bytes are not a snapshot, are of another version, or are damaged."""
