"""Hits under sliding windows, of which only the visible blocks are needed."""

from __future__ import annotations

from prefix_samples import count, hit, serve

from pykvcache.allocator import (
    BlockAllocator,
)


def test_windows_only_need_the_blocks_that_are_read() -> None:
    allocator = BlockAllocator(40, 4, groups=2, prefix_cache=True, windows=(0, 6))
    seqs = allocator.allocate_cached([[]])[0]
    batch = allocator.batch(seqs, windows=(0, 6))
    for start in range(0, 24, 4):
        batch.step(4)
        allocator.record(seqs, count(start, 4), 4)
    batch.step(0)
    assert (allocator.block_table(seqs, 1)[0] >= 0).tolist() == [False] * 4 + [True] * 2
    allocator.free(seqs)
    allocator.check_integrity()
    assert hit(allocator, count(0, 24)) == 24
    seqs, _ = allocator.allocate_cached([count(0, 24)])
    assert (allocator.block_table(seqs, 0) >= 0).all()
    assert (allocator.block_table(seqs, 1)[0] >= 0).tolist() == [False] * 4 + [True] * 2
    allocator.check_integrity()


def test_a_window_whose_blocks_were_evicted_shortens_the_hit() -> None:
    allocator = BlockAllocator(12, 4, groups=2, prefix_cache=True, windows=(0, 4))
    seqs = allocator.allocate_cached([[]])[0]
    batch = allocator.batch(seqs, windows=(0, 4))
    for start in range(0, 24, 4):
        batch.step(4)
        allocator.record(seqs, count(start, 4), 4)
    windowed = [b for b in range(12) if b not in allocator.block_table(seqs, 0)[0]]
    assert len(windowed) == 6 and allocator.num_cached == 4, "out of the window, still known"
    held = allocator.allocate([4])
    assert allocator.num_cached == 2 and allocator.stats().evictions == 2
    allocator.check_integrity()
    assert [hit(allocator, count(0, n)) for n in (24, 20, 16, 15, 12, 8, 4)] == [
        *(24, 20, 16, 15, 12),
        *(0, 0),
    ]
    allocator.free([*seqs, *held])
    serve(allocator, count(0, 8))
    assert hit(allocator, count(0, 8)) == 8, "missing blocks of a known prefix are filled in"
    allocator.check_integrity()


def test_windows_alone_keep_a_bounded_number_of_nodes() -> None:
    allocator = BlockAllocator(8, 2, prefix_cache=True, windows=(4,))
    size = 0
    for round_number in range(6):
        seqs = allocator.allocate_cached([[]])[0]
        batch = allocator.batch(seqs, windows=(4,))
        for start in range(0, 200, 2):
            batch.step(2)
            allocator.record(seqs, [round_number, start], 2)
        allocator.check_integrity()
        allocator.free(seqs)
        allocator.check_integrity()
        if round_number == 1:
            size = allocator.stats().metadata_bytes
    assert allocator.num_free == 8
    assert allocator.stats().metadata_bytes == size
    prompt = [token for start in range(0, 40, 2) for token in (9, start)]
    seqs = allocator.allocate_cached([[]])[0]
    batch = allocator.batch(seqs, windows=(4,))
    for start in range(0, 40, 2):
        batch.step(2)
        allocator.record(seqs, prompt[start : start + 2], 2)
    allocator.free(seqs)
    assert hit(allocator, prompt) == 40 and hit(allocator, prompt[:20]) == 0


def test_a_released_block_of_a_full_group_is_not_shared() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = allocator.allocate_cached([[]])[0]
    allocator.append(seqs, 12)
    allocator.release_before(seqs, [8])
    allocator.record(seqs, count(0, 12), 12)
    assert hit(allocator, count(0, 12)) == 0
    allocator.check_integrity()
