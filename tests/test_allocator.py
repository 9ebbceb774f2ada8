"""BlockAllocator: which blocks it gives, shares, copies, releases, pins and runs out of."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest

from pykvcache.allocator import AllocatorError, BlockAllocator, OutOfBlocks, UnknownSequence


def table(allocator: BlockAllocator, seq: int, group: int = 0) -> list[int]:
    return allocator.block_table([seq], group)[0].tolist()


def test_new_and_reused_blocks_come_in_ascending_order() -> None:
    allocator = BlockAllocator(100, 16)
    seqs = allocator.allocate([100, 60, 33])
    fresh = allocator.block_table(seqs).tolist()
    assert fresh == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, -1, -1, -1], [11, 12, 13, -1, -1, -1, -1]]
    allocator.free(seqs)
    assert allocator.num_free == 100
    assert allocator.block_table(allocator.allocate([100, 60, 33])).tolist() == fresh
    assert allocator.peak == 14


def test_groups_have_tables_of_their_own() -> None:
    allocator = BlockAllocator(20, 4, groups=2)
    seq = int(allocator.allocate([9])[0])
    assert table(allocator, seq, 0) == [0, 1, 2]
    assert table(allocator, seq, 1) == [3, 4, 5]
    assert allocator.slot_mapping([seq], [2], group=1).tolist() == [19, 20]


def test_writing_a_shared_block_copies_it_for_all_but_the_last_owner() -> None:
    allocator = BlockAllocator(20, 4)
    parent = int(allocator.allocate([6])[0])
    children = allocator.fork(parent, 2)
    assert allocator.num_free == 18
    (pairs,) = allocator.append([parent, *children.tolist()])
    assert pairs.tolist() == [[1, 2], [1, 3]]
    assert [table(allocator, s) for s in (parent, *children)] == [[0, 2], [0, 3], [0, 1]]
    assert allocator.append(children)[0].size == 0


def test_a_full_shared_block_is_not_copied() -> None:
    allocator = BlockAllocator(20, 4)
    parent = allocator.allocate([8])
    child = allocator.fork(parent)
    assert allocator.append(child)[0].size == 0
    assert table(allocator, int(child[0])) == [0, 1, 2]


def test_select_moves_first_takers_and_shares_with_the_rest() -> None:
    allocator = BlockAllocator(20, 4)
    seqs = allocator.allocate([4, 8, 4])
    selected = allocator.select(seqs, [1, 1, 0])
    assert allocator.block_table(selected).tolist() == [[1, 2], [1, 2], [0, -1]]
    assert allocator.num_free == 17 and allocator.num_sequences == 3
    with pytest.raises(UnknownSequence, match="row 0 was freed or replaced before"):
        allocator.lengths(seqs)


def test_release_before_leaves_holes_and_gives_blocks_back() -> None:
    allocator = BlockAllocator(20, 4, groups=2)
    seq = allocator.allocate([13])
    allocator.release_before(seq, [9], group=1)
    assert table(allocator, int(seq[0]), 1) == [-1, -1, 6, 7]
    assert table(allocator, int(seq[0]), 0) == [0, 1, 2, 3]
    assert allocator.num_free == 14
    assert allocator.slot_mapping(seq, 6, group=1).tolist() == [-1, 24, 25, 26, 27, 28]
    with pytest.raises(ValueError, match="lengths\\[0\\] is 7, but tokens below 8 of group 1 were"):
        allocator.truncate(seq, [7])
    allocator.truncate(seq, [8])
    allocator.append(seq, [1])
    assert table(allocator, int(seq[0]), 1)[:2] == [-1, -1]
    allocator.truncate(seq, [0])
    assert allocator.num_free == 20


def test_reserved_blocks_are_used_before_new_ones() -> None:
    allocator = BlockAllocator(10, 4)
    seq = allocator.allocate([3])
    allocator.reserve(seq, [12])
    assert allocator.num_free == 7 and allocator.stats().reserved == 8
    child = allocator.fork(seq)
    assert table(allocator, int(child[0])) == [0]
    allocator.append(seq, [6])
    assert allocator.num_free == 6, "a copy of the shared block, and the reserved ones"


def test_pinned_blocks_outlive_their_sequence_and_are_not_written() -> None:
    allocator = BlockAllocator(10, 4)
    seq = allocator.allocate([6])
    blocks = allocator.pin_sequences(seq)
    assert blocks.tolist() == [0, 1]
    assert allocator.append(seq)[0].tolist() == [[1, 2]]
    allocator.free(seq)
    assert allocator.num_free == 8
    assert allocator.allocate([40 - 8]).size == 1, "the other blocks can all be given out"
    allocator.check_integrity()
    allocator.unpin(blocks)
    assert allocator.num_free == 2


def test_growing_keeps_ids_and_adds_free_blocks() -> None:
    allocator = BlockAllocator(2, 4)
    seq = allocator.allocate([8])
    with pytest.raises(OutOfBlocks):
        allocator.append(seq)
    allocator.grow(5)
    allocator.append(seq, 9)
    assert table(allocator, int(seq[0])) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="num_blocks must be 5 to"):
        allocator.grow(4)


def test_out_of_blocks_says_how_many_and_changes_nothing() -> None:
    allocator = BlockAllocator(10, 4)
    seqs = allocator.allocate([12, 12])
    with pytest.raises(OutOfBlocks) as caught:
        allocator.append(seqs, [4, 20])
    error = caught.value
    assert (error.needed, error.free, error.total) == (6, 4, 10)
    assert str(error) == "append needs 6 new blocks, but only 4 of 10 are free"
    assert isinstance(error, AllocatorError) and isinstance(error, RuntimeError)
    assert allocator.lengths(seqs).tolist() == [12, 12] and allocator.num_free == 4
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.needed, str(copy)) == (6, str(error))


@pytest.mark.parametrize("block_size", [1, 3, 7, 16, 1000, 65536])
def test_positions_map_to_slots_for_every_block_size(block_size: int) -> None:
    top = 2**31 - 1 if block_size == 65536 else 5 * block_size + 1
    allocator = BlockAllocator(2**15 + 8, block_size)
    allocator.allocate([block_size])
    for length in (1, block_size - 1, block_size, block_size + 1, 3 * block_size, top):
        seq = allocator.allocate([length])
        count = min(length, 2 * block_size + 1)
        positions = np.arange(length - count, length)
        blocks = allocator.block_table(seq)[0].astype(np.int64)
        assert len(blocks) == -(-length // block_size)
        wanted = blocks[positions // block_size] * block_size + positions % block_size
        assert allocator.slot_mapping(seq, [count]).tolist() == wanted.tolist()
        allocator.free(seq)


def test_slots_beyond_two_to_the_31() -> None:
    allocator = BlockAllocator(2**20, 4096)
    seqs = allocator.allocate([2**31 - 1, 2**31 - 1])
    assert allocator.slot_mapping(seqs, [0, 1]).tolist() == [2**32 - 2]


def test_threads_share_an_allocator() -> None:
    allocator = BlockAllocator(4000, 4, groups=2)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(150):
                seqs = allocator.allocate(random.integers(0, 40, 4))
                batch = allocator.batch(seqs, windows=(0, 8))
                for _ in range(10):
                    batch.step()
                children = allocator.fork(seqs, 2)
                allocator.append(children, random.integers(0, 9, 8))
                seqs = allocator.select(seqs, [3, 3, 0])
                allocator.check_integrity()
                allocator.stats()
                allocator.free([*seqs.tolist(), *children.tolist()])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    allocator.check_integrity()
    assert allocator.num_free == 4000 and allocator.num_sequences == 0
