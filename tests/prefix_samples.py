"""What the tests of the prefix cache share: prompts that are served, looked up and ended."""

from __future__ import annotations

import numpy as np

from pykvcache.allocator import (
    BlockAllocator,
)


def table(allocator: BlockAllocator, seqs: np.ndarray, group: int = 0) -> list[int]:
    return allocator.block_table(seqs[:1], group)[0].tolist()


def serve(
    allocator: BlockAllocator, prompt: list[int], salt: int = 0, priority: int = 0
) -> np.ndarray:
    """A sequence that holds a prompt, all of it recorded."""
    seqs, hits = allocator.allocate_cached([prompt], salt)
    rest = prompt[hits[0] :]
    allocator.append(seqs, len(rest))
    allocator.record(seqs, rest, len(rest))
    if priority:
        allocator.set_priority(seqs, priority)
    allocator.check_integrity()
    return seqs


def serve_and_end(allocator: BlockAllocator, prompt: list[int], **settings: int) -> list[int]:
    """The blocks that held it."""
    seqs = serve(allocator, prompt, **settings)
    blocks = table(allocator, seqs)
    allocator.free(seqs)
    allocator.check_integrity()
    return blocks


def hit(allocator: BlockAllocator, prompt: list[int], salt: int = 0) -> int:
    return int(allocator.lookup([prompt], salt)[0])


def count(start: int, length: int) -> list[int]:
    return list(range(start, start + length))
