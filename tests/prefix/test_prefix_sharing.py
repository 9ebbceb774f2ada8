"""Cached blocks among sequences: merging, forks, truncation, snapshots, shares of the pool."""

from __future__ import annotations

import pytest
from prefix_samples import count, hit, serve, serve_and_end, table

from pykvcache.allocator import (
    BlockAllocator,
    OutOfBlocks,
)


def test_a_full_block_that_is_known_takes_the_place_of_its_copy() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = allocator.allocate_cached([[], []])[0]
    batch = allocator.batch(seqs)
    batch.step(6)
    before = batch.block_tables[0][:, :2].tolist()
    allocator.record(seqs, [*count(0, 6), *count(0, 6)], 6)
    assert allocator.stats().merged_blocks == 1
    assert allocator.block_table(seqs).tolist() == [before[0], [before[0][0], before[1][1]]]
    assert allocator.num_free == 17
    batch.step(0)
    assert batch.block_tables[0][:, :2].tolist() == allocator.block_table(seqs).tolist()
    allocator.check_integrity()


def test_merging_keeps_pins_and_forks() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    serve(allocator, count(0, 4))
    seqs = allocator.allocate([4])
    (own,) = allocator.pin_sequences(seqs).tolist()
    child = allocator.fork(seqs)
    allocator.record(seqs, count(0, 4), 4)
    assert table(allocator, seqs) != [own] == table(allocator, child)
    allocator.record(child, count(0, 4), 4)
    assert table(allocator, child) == table(allocator, seqs)
    assert allocator.num_free == 18
    allocator.unpin([own])
    allocator.check_integrity()
    assert allocator.num_free == 19


def test_forks_inherit_what_was_recorded() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = serve(allocator, count(0, 6))
    children = allocator.fork(seqs, 2)
    allocator.append(children, 2)
    allocator.record(children, [6, 7, 8, 9], 2)
    allocator.free(seqs)
    assert [hit(allocator, p) for p in (count(0, 8), [*count(0, 6), 8, 9])] == [8, 8]
    selected = allocator.select(children, [1, 1])
    allocator.append(selected, 1)
    allocator.record(selected, [30, 31])
    allocator.free(selected)
    known = [[*count(0, 6), 8, 9, end] for end in (30, 31, 32)]
    assert [hit(allocator, prompt) for prompt in known] == [9, 9, 8]
    allocator.check_integrity()


def test_truncating_takes_back_what_was_recorded() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = serve(allocator, count(0, 11))
    allocator.truncate(seqs, [6])
    allocator.check_integrity()
    assert hit(allocator, count(0, 11)) == 8, "full blocks that were computed stay known"
    (pairs,) = allocator.append(seqs, 2)
    assert pairs.shape == (1, 2), "the known block is not overwritten"
    allocator.record(seqs, [70, 71], 2)
    assert [hit(allocator, p) for p in (count(0, 8), [*count(0, 6), 70, 71])] == [8, 8]
    allocator.truncate(seqs, [5])
    allocator.truncate(seqs, [4])
    allocator.append(seqs, 1)
    with pytest.raises(ValueError, match="has 5 tokens, of which 4 were recorded"):
        allocator.record(seqs, [0, 0], 2)
    allocator.record(seqs, [80])
    allocator.free(seqs)
    assert hit(allocator, [*count(0, 4), 80, 1]) == 5
    allocator.check_integrity()


def test_restoring_a_snapshot_forgets_prefixes() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    serve_and_end(allocator, count(50, 8))
    seqs = serve(allocator, count(0, 6))
    snapshot = allocator.snapshot()
    allocator.restore(snapshot)
    allocator.check_integrity()
    assert hit(allocator, count(50, 8)) == hit(allocator, count(0, 6)) == allocator.num_cached == 0
    allocator.append(seqs, 2)
    allocator.record(seqs, count(0, 8), 8)
    assert hit(allocator, count(0, 8)) == 0
    serve(allocator, count(0, 8))
    assert hit(allocator, count(0, 8)) == 8
    tenant = serve(allocator, count(60, 4), salt=7)
    allocator.restore(allocator.snapshot())
    allocator.truncate(tenant, 0)
    allocator.append(tenant, 4)
    allocator.record(tenant, count(60, 4), 4)
    assert allocator.lookup([count(60, 4)] * 2, [0, 7]).tolist() == [0, 0], "its salt is not known"
    plain = BlockAllocator(20, 4)
    plain.restore(snapshot)
    assert (plain.num_free, plain.num_cached) == (18, 0)
    assert plain.allocate([18 * 4]).size == 1


def test_a_clone_has_the_same_prefixes() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    serve_and_end(allocator, count(0, 8))
    clone = allocator.clone()
    allocator.forget_prefixes()
    assert (hit(allocator, count(0, 8)), hit(clone, count(0, 8))) == (0, 8)
    clone.allocate([80])
    clone.check_integrity()
    allocator.check_integrity()


def test_a_grown_pool_keeps_its_prefixes() -> None:
    allocator = BlockAllocator(3, 2, prefix_cache=True)
    serve_and_end(allocator, count(0, 6))
    allocator.grow(3000)
    assert hit(allocator, count(0, 6)) == 6
    for start in range(10, 5000, 10):
        serve_and_end(allocator, count(start, 8))
    assert hit(allocator, count(0, 6)) == 6 and hit(allocator, count(2500, 8)) == 8
    assert allocator.stats().evictions == 0


def test_cached_blocks_count_as_free_in_the_shares() -> None:
    allocator = BlockAllocator(10, 4, prefix_cache=True)
    seqs = serve(allocator, count(0, 6))
    serve_and_end(allocator, count(10, 8))
    stats = allocator.stats()
    assert (stats.live, stats.internal, stats.idle) == (6, 2, 32)
    assert (stats.used_blocks, stats.cached_blocks) == (2, 2)
    assert (stats.prompt_tokens, stats.hit_tokens, stats.hit_rate) == (14, 0, 0)
    allocator.allocate_cached([count(10, 9)])
    assert (allocator.stats().hit_tokens, allocator.stats().hit_rate) == (8, 8 / 23)
    with pytest.raises(OutOfBlocks):
        allocator.append(seqs, 40)
    assert allocator.stats().external == 24
    assert sum(allocator.stats().percent().values()) == 100
