"""The prefix cache of BlockAllocator: hits, sharing, merging, eviction, and what ends them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from pykvcache.allocator import (
    BlockAllocator,
    IntegrityError,
    OutOfBlocks,
    UnknownBlock,
    UnknownSequence,
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


def test_a_prompt_is_found_again_after_its_sequence() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    blocks = serve_and_end(allocator, count(0, 8))
    assert (allocator.num_cached, allocator.num_free) == (2, 20)
    seqs, hits = allocator.allocate_cached([count(0, 8), [*count(0, 4), 9, 9, 9, 9], [7]])
    assert hits.tolist() == [8, 4, 0] and hits.dtype == seqs.dtype == np.int64
    assert allocator.lengths(seqs).tolist() == [8, 4, 0]
    assert allocator.block_table(seqs).tolist() == [blocks, [blocks[0], -1], [-1, -1]]
    assert (allocator.num_cached, allocator.num_free) == (0, 18)


def test_full_blocks_of_a_live_sequence_are_shared() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    first = serve(allocator, count(0, 10))
    assert hit(allocator, count(0, 10)) == 8, "the last block is known when the sequence ends"
    second = serve(allocator, count(0, 10))
    assert table(allocator, second)[:2] == table(allocator, first)[:2]
    allocator.free(first)
    assert hit(allocator, count(0, 10)) == 10


def test_a_hit_may_end_inside_a_block_which_is_copied_when_written() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    blocks = serve_and_end(allocator, count(0, 8))
    seqs, hits = allocator.allocate_cached([[*count(0, 6), 99]])
    assert hits.tolist() == [6] and table(allocator, seqs) == blocks
    (pairs,) = allocator.append(seqs, 1)
    assert pairs.tolist() == [[blocks[1], table(allocator, seqs)[1]]]
    assert pairs[0, 0] != pairs[0, 1]
    allocator.record(seqs, [99])
    assert hit(allocator, count(0, 8)) == 8
    allocator.free(seqs)
    assert [hit(allocator, p) for p in (count(0, 8), [*count(0, 6), 99, 5])] == [8, 7]


def test_the_end_of_a_sequence_is_continued_in_place() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    serve_and_end(allocator, count(0, 6))
    seqs, hits = allocator.allocate_cached([count(0, 8)])
    assert hits.tolist() == [6]
    assert allocator.append(seqs, 2)[0].size == 0, "nobody else reads the rest of the block"
    allocator.record(seqs, [6, 7], 2)
    allocator.check_integrity()
    assert [hit(allocator, count(0, n)) for n in (5, 6, 7, 8)] == [5, 6, 7, 8]


def test_an_end_that_two_sequences_continue_is_copied_by_the_first() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    block = serve_and_end(allocator, [1, 2])[0]
    seqs, hits = allocator.allocate_cached([[1, 2], [1, 2]])
    assert hits.tolist() == [2, 2]
    assert allocator.append(seqs, 1)[0].tolist() == [[block, allocator.block_table(seqs)[0, 0]]]
    allocator.record(seqs, [3, 4])
    allocator.free(seqs)
    assert [hit(allocator, p) for p in ([1, 2, 3], [1, 2, 4], [1, 2, 5])] == [3, 3, 2]


def test_of_many_continuations_the_longest_is_found() -> None:
    random = np.random.default_rng(0)
    allocator = BlockAllocator(2000, 8, prefix_cache=True)
    prompts = [[5] * 8 + random.integers(0, 3, random.integers(1, 12)).tolist() for _ in range(400)]
    for prompt in prompts:
        serve_and_end(allocator, prompt)
    for _ in range(200):
        wanted = [5] * 8 + random.integers(0, 3, 7).tolist()
        most = max(
            next(
                (i for i, (a, b) in enumerate(zip(p, wanted, strict=False)) if a != b),
                min(len(p), 15),
            )
            for p in prompts
        )
        assert hit(allocator, wanted) == most


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


def test_prompts_with_another_salt_share_nothing() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    prompt = count(0, 8)
    first = serve(allocator, prompt, salt=1)
    salts = [0, 1, 2, -1, 2**63 - 1, -(2**63)]
    assert allocator.lookup([prompt] * 6, salts).tolist() == [0, 8, 0, 0, 0, 0]
    second = serve(allocator, prompt, salt=-(2**63))
    assert not set(table(allocator, first)) & set(table(allocator, second))
    assert allocator.lookup([prompt] * 6, salts).tolist() == [0, 8, 0, 0, 0, 8]
    with pytest.raises(ValueError, match="salts must have one entry for each of 2 rows, got 3"):
        allocator.allocate_cached([prompt] * 2, [1, 2, 3])


def test_prompts_that_collide_share_nothing_wrong() -> None:
    """The same with all hashes equal as with hashes that differ, and no block is mistaken."""
    random = np.random.default_rng(1)
    usual, colliding = (BlockAllocator(60, 2, prefix_cache=True) for _ in range(2))
    colliding._core._collide_hashes()
    holds: dict[int, tuple[int, ...]] = {}
    for _ in range(400):
        prompt = random.integers(0, 3, random.integers(1, 12)).tolist()
        salt = int(random.integers(0, 2))
        assert hit(usual, prompt, salt) == hit(colliding, prompt, salt)
        seqs, hits = colliding.allocate_cached([prompt], salt)
        for i, block in enumerate(table(colliding, seqs)):
            held, wanted = holds[block], (salt, *prompt[: min(2 * i + 2, hits[0])])
            assert held[: len(wanted)] == wanted
        copies = colliding.append(seqs, len(prompt) - hits[0])[0]
        assert len(copies) <= 1
        for i, block in enumerate(table(colliding, seqs)):
            new = (salt, *prompt[: 2 * i + 2])
            if i >= hits[0] // 2 and holds.get(block, ())[: len(new)] != new:
                holds[block] = new
        colliding.record(seqs, prompt[hits[0] :], len(prompt) - hits[0])
        colliding.free(seqs)
        colliding.check_integrity()
        serve_and_end(usual, prompt, salt=salt)
        assert usual.num_cached == colliding.num_cached
    assert usual.stats().evictions == colliding.stats().evictions > 100
    assert colliding.stats().hit_rate == usual.stats().hit_rate > 0.3


def test_equal_tokens_after_another_beginning_are_another_block() -> None:
    allocator = BlockAllocator(20, 2, prefix_cache=True)
    allocator._core._collide_hashes()
    serve(allocator, [1, 1, 7, 7])
    assert hit(allocator, [2, 2, 7, 7]) == 0
    serve(allocator, [2, 2, 8, 8])
    assert [hit(allocator, p) for p in ([2, 2, 7, 7], [7, 7], [1, 1, 8, 8])] == [2, 0, 2]


def test_what_was_recorded_before_the_weights_changed_is_never_found() -> None:
    allocator = BlockAllocator(20, 2, prefix_cache=True)
    serve_and_end(allocator, count(50, 4))
    seqs = serve(allocator, count(0, 4))
    idle = allocator.allocate_cached([[]])[0]
    allocator.forget_prefixes()
    allocator.check_integrity()
    assert allocator.num_cached == 0 and hit(allocator, count(0, 4)) == hit(allocator, [50]) == 0
    for row in (seqs, idle):
        allocator.append(row, 4)
        allocator.record(row, count(4, 4), 4)
    assert hit(allocator, count(0, 8)) == 0, "its blocks build on old ones"
    child = allocator.fork(seqs)
    allocator.free([*seqs, *idle])
    assert hit(allocator, count(0, 8)) == allocator.num_cached == 0
    new = serve(allocator, count(0, 4))
    assert hit(allocator, count(0, 8)) == 4
    allocator.append(new, 4)
    allocator.record(new, count(4, 4), 4)
    assert hit(allocator, count(0, 8)) == 8
    allocator.truncate(child, 0)
    allocator.append(child, 2)
    allocator.record(child, [70, 71], 2)
    assert hit(allocator, [70, 71]) == 2, "it has begun anew with the new weights"
    allocator.check_integrity()


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


def test_tokens_that_were_not_recorded_are_not_found() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = allocator.allocate_cached([[]])[0]
    allocator.append(seqs, 12)
    allocator.record(seqs, count(0, 5), 5)
    allocator.free(seqs)
    assert hit(allocator, count(0, 12)) == 5


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


Call = Callable[[BlockAllocator, int], object]
BAD_CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "beyond the end": (
        lambda a, seq: a.record([seq], [1, 2], 2),
        ValueError,
        r"record: counts\[0\] is 2, but the sequence has 5 tokens, of which 4 were recorded",
    ),
    "number of tokens": (
        lambda a, seq: a.record([seq], [1, 2]),
        ValueError,
        "record: tokens must have 1 entries, the sum of counts, got 2",
    ),
    "negative count": (
        lambda a, seq: a.record([seq], [], [-1]),
        ValueError,
        r"record: counts\[0\] must be 0 to 2147483647, got -1",
    ),
    "twice": (lambda a, seq: a.record([seq, seq], [1, 1]), ValueError, "in the batch twice"),
    "unknown": (
        lambda a, seq: a.record([seq, 7], [1, 1]),
        UnknownSequence,
        "record: sequence 7 in row 1 does not belong to this allocator",
    ),
    "float tokens": (
        lambda a, seq: a.record([seq], np.array([0.5])),
        TypeError,
        "tokens must be integers, got float64",
    ),
    "float prompt": (
        lambda a, seq: a.lookup([[1], [0.5]]),
        TypeError,
        r"prompts\[1\] must be integers, got float64",
    ),
    "flat prompt": (
        lambda a, seq: a.lookup([1, 2]),
        ValueError,
        r"prompts\[0\] must be a list of token ids, got shape \[\]",
    ),
    "nested prompt": (
        lambda a, seq: a.allocate_cached([[[1]]]),
        ValueError,
        r"prompts\[0\] must be a list of token ids, got shape \[1, 1\]",
    ),
    "number of priorities": (
        lambda a, seq: a.set_priority([seq], [1, 2]),
        ValueError,
        "set_priority: priorities must have one entry for each of 1 rows, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_why_and_change_nothing(name: str) -> None:
    call, error, text = BAD_CALLS[name]
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = serve(allocator, count(0, 4))
    allocator.append(seqs, 1)
    before = allocator.snapshot(), allocator.stats()
    with pytest.raises(error, match=text):
        call(allocator, int(seqs[0]))
    assert (allocator.snapshot(), allocator.stats()) == before
    allocator.check_integrity()


def test_without_a_prefix_cache_its_methods_say_so() -> None:
    allocator = BlockAllocator(20, 4)
    seqs = allocator.allocate([4])
    calls: list[Callable[[], object]] = [
        lambda: allocator.allocate_cached([[1]]),
        lambda: allocator.lookup([[1]]),
        lambda: allocator.record(seqs, [1]),
        lambda: allocator.set_priority(seqs, 1),
        allocator.forget_prefixes,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="was made without prefix_cache=True"):
            call()
    assert allocator.num_cached == 0
    with pytest.raises(ValueError, match="only prefix_cache=True uses it"):
        BlockAllocator(20, 4, windows=(3,))
    with pytest.raises(ValueError, match="windows must have one entry for each of 2 groups, got 1"):
        BlockAllocator(20, 4, 2, prefix_cache=True, windows=(3,))
    with pytest.raises(ValueError, match=r"windows\[0\] must be 0 to 2147483647, got -3"):
        BlockAllocator(20, 4, prefix_cache=True, windows=(-3,))


def test_a_wrong_reference_count_of_a_cached_block_is_found() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    blocks = serve_and_end(allocator, count(0, 8))
    allocator._core._damage_refs(blocks[0])
    with pytest.raises(IntegrityError, match=f"block {blocks[0]} "):
        allocator.check_integrity()


def test_ten_thousand_requests_do_not_grow_the_index() -> None:
    random = np.random.default_rng(2)
    allocator = BlockAllocator(300, 4, prefix_cache=True)
    live: list[np.ndarray] = []
    sizes = []
    for request in range(10_000):
        prompt = random.integers(0, 3, random.integers(1, 60))
        seqs, hits = allocator.allocate_cached([prompt[:-1]])
        rest = prompt[hits[0] :]
        allocator.append(seqs, rest.size)
        allocator.record(seqs, rest, rest.size)
        live.append(seqs)
        if len(live) > 8:
            allocator.free(live.pop(int(random.integers(0, 8))))
        if request % 1000 == 999:
            sizes.append(allocator.stats().metadata_bytes)
            allocator.check_integrity()
    assert max(sizes[1:]) <= sizes[0] * 1.02
    allocator.free(np.concatenate(live))
    assert allocator.num_free == 300 and allocator.stats().hit_rate > 0.05


def test_threads_share_a_prefix_cache() -> None:
    allocator = BlockAllocator(400, 4, prefix_cache=True)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(200):
                prompt = random.integers(0, 2, 30)
                seqs, hits = allocator.allocate_cached([prompt])
                allocator.append(seqs, 30 - hits)
                allocator.record(seqs, prompt[hits[0] :], 30 - hits)
                allocator.lookup([prompt])
                allocator.free(seqs)
                allocator.check_integrity()
                if random.integers(0, 20) == 0:
                    allocator.forget_prefixes()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert allocator.num_free == 400 and allocator.num_sequences == 0
