"""Which cached blocks a full pool gives up, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_samples import count, hit, serve, serve_and_end, table

from pykvcache.allocator import (
    BlockAllocator,
    OutOfBlocks,
    UnknownBlock,
)


def test_the_least_recently_used_prefix_goes_first_and_from_its_tail() -> None:
    allocator = BlockAllocator(6, 2, prefix_cache=True)
    serve_and_end(allocator, count(0, 6))
    serve_and_end(allocator, count(10, 6))
    serve_and_end(allocator, count(0, 6))
    held = allocator.allocate([2])
    assert [hit(allocator, count(n, 6)) for n in (0, 10)] == [6, 4]
    held = np.append(held, allocator.allocate([4]))
    assert [hit(allocator, count(n, 6)) for n in (0, 10)] == [6, 0]
    held = np.append(held, allocator.allocate([4]))
    assert [hit(allocator, count(n, 6)) for n in (0, 10)] == [2, 0]
    assert (allocator.num_cached, allocator.num_free) == (1, 1)
    assert allocator.stats().evictions == 5
    with pytest.raises(OutOfBlocks) as caught:
        allocator.allocate([4])
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert hit(allocator, [0, 1]) == 2


def test_free_blocks_are_used_before_cached_ones() -> None:
    allocator = BlockAllocator(6, 2, prefix_cache=True)
    serve_and_end(allocator, count(0, 6))
    allocator.free(allocator.allocate([6]))
    allocator.allocate([6])
    assert hit(allocator, count(0, 6)) == 6 and allocator.num_free == 3


def test_blocks_of_low_priority_go_first() -> None:
    allocator = BlockAllocator(8, 2, prefix_cache=True)
    for start, priority in ((0, 3), (10, -128), (20, 0), (30, 127)):
        serve_and_end(allocator, count(start, 4), priority=priority)
    seqs, found = [], []
    for _ in range(4):
        seqs.append(allocator.allocate([4]))
        allocator.check_integrity()
        found.append([hit(allocator, count(start, 4)) for start in (10, 20, 0, 30)])
    assert found == [[0, 4, 4, 4], [0, 0, 4, 4], [0, 0, 0, 4], [0, 0, 0, 0]]


def test_a_priority_holds_for_later_blocks_and_is_not_lowered_by_sharing() -> None:
    allocator = BlockAllocator(6, 2, prefix_cache=True)
    seqs = serve(allocator, [1, 2], priority=2)
    allocator.append(seqs, 2)
    allocator.record(seqs, [3, 4], 2)
    allocator.free(seqs)
    serve_and_end(allocator, [1, 2, 9, 9])
    serve_and_end(allocator, [50, 51, 52, 53])
    allocator.allocate([8])
    assert [hit(allocator, p) for p in ([1, 2, 3, 4], [1, 2, 9, 9], [50, 51])] == [4, 2, 0]
    for value in (-129, 128):
        with pytest.raises(ValueError, match=rf"priorities\[0\] must be -128 to 127, got {value}"):
            allocator.set_priority(allocator.allocate([0]), value)


def test_what_hangs_on_an_evicted_block_goes_with_it() -> None:
    allocator = BlockAllocator(4, 2, prefix_cache=True)
    serve_and_end(allocator, count(0, 8), priority=5)
    seqs, _ = allocator.allocate_cached([count(0, 4)])
    allocator.set_priority(seqs, -1)
    allocator.free(seqs)
    allocator.allocate([2])
    assert hit(allocator, count(0, 8)) == 2, "the second block went, and all after it"
    assert (allocator.num_cached, allocator.num_free) == (1, 3)
    allocator.check_integrity()


def test_referenced_and_pinned_blocks_are_never_evicted() -> None:
    allocator = BlockAllocator(6, 2, prefix_cache=True)
    seqs = serve(allocator, count(0, 4))
    blocks = allocator.pin_sequences(seqs)
    live = serve(allocator, count(10, 4))
    allocator.free(seqs)
    allocator.free(allocator.allocate([4]))
    with pytest.raises(OutOfBlocks):
        allocator.allocate([6])
    assert [hit(allocator, count(n, 4)) for n in (0, 10)] == [4, 4]
    allocator.unpin(blocks)
    allocator.check_integrity()
    assert (allocator.num_cached, allocator.num_free) == (2, 4)
    with pytest.raises(UnknownBlock, match="is free"):
        allocator.pin(blocks)
    allocator.allocate([8])
    assert [hit(allocator, count(n, 4)) for n in (0, 10)] == [0, 4]
    assert allocator.lengths(live).tolist() == [4]


def test_a_full_pool_gives_up_what_is_known_rather_than_fail() -> None:
    allocator = BlockAllocator(2, 4, prefix_cache=True)
    blocks = serve_and_end(allocator, count(0, 8))
    seqs, hits = allocator.allocate_cached([count(0, 7)])
    assert hits.tolist() == [7] and allocator.num_free == 0
    assert allocator.append(seqs, 1)[0].size == 0
    assert table(allocator, seqs) == blocks
    allocator.check_integrity()
    allocator.record(seqs, [9])
    assert [hit(allocator, p) for p in (count(0, 8), [*count(0, 7), 9])] == [7, 8]
