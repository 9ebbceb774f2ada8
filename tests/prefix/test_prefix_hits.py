"""What a prompt finds again, and what it must not find."""

from __future__ import annotations

import numpy as np
import pytest
from prefix_samples import count, hit, serve, serve_and_end, table

from pykvcache.allocator import (
    BlockAllocator,
)


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


def test_tokens_that_were_not_recorded_are_not_found() -> None:
    allocator = BlockAllocator(20, 4, prefix_cache=True)
    seqs = allocator.allocate_cached([[]])[0]
    allocator.append(seqs, 12)
    allocator.record(seqs, count(0, 5), 5)
    allocator.free(seqs)
    assert hit(allocator, count(0, 12)) == 5
