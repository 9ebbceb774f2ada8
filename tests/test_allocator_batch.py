"""Batch: one call a step that appends, releases and writes the metadata arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pykvcache.allocator import BlockAllocator, OutOfBlocks, UnknownSequence


def test_a_packed_prefill_then_decode() -> None:
    allocator = BlockAllocator(20, 4)
    batch = allocator.batch(allocator.allocate([0, 0]))
    batch.step([5, 2])
    assert batch.slot_mappings[0].tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 7] and batch.max_seqlen_q == 5
    batch.step()
    assert batch.slot_mappings[0].tolist() == [5, 10]
    assert batch.seq_lens.tolist() == [6, 3] and batch.max_seqlen_q == 1
    assert batch.block_tables[0][:, :3].tolist() == [[0, 1, -1], [2, -1, -1]]


def test_left_padding_is_skipped() -> None:
    allocator = BlockAllocator(20, 4)
    batch = allocator.batch(allocator.allocate([0, 0, 0]))
    batch.step([3, 1, 0], width=3)
    assert batch.slot_mappings[0].tolist() == [0, 1, 2, -1, -1, 4, -1, -1, -1]
    assert batch.seq_lens.tolist() == [3, 1, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 6, 9] and batch.max_seqlen_q == 3


def test_arrays_stay_while_their_shapes_do() -> None:
    allocator = BlockAllocator(200, 4)
    batch = allocator.batch(allocator.allocate([9, 9]), columns=8)
    batch.step()
    revision = batch.revision
    tensors = [torch.from_numpy(a) for a in (batch.block_tables[0], batch.seq_lens)]
    for _ in range(20):
        batch.step()
    assert batch.revision == revision
    assert tensors[0].tolist() == batch.block_tables[0].tolist()
    assert tensors[1].tolist() == [30, 30]
    batch.step(3)
    assert batch.revision > revision and batch.slot_mappings[0].shape == (6,)
    revision = batch.revision
    batch.step(100)
    assert batch.revision > revision and batch.block_tables[0].shape[1] >= 34
    wanted = allocator.block_table(batch.seqs)
    assert batch.block_tables[0][:, : wanted.shape[1]].tolist() == wanted.tolist()


def test_blocks_out_of_the_window_go_at_the_next_step() -> None:
    allocator = BlockAllocator(20, 4, groups=2)
    seq = allocator.allocate([0])
    batch = allocator.batch(seq, windows=(0, 5))
    batch.step(9)
    assert (batch.block_tables[1][0] >= 0).sum() == 3, "nothing goes in the step that wrote it"
    batch.step(1)
    assert batch.block_tables[1][0, :3].tolist() == [-1, 4, 5]
    assert allocator.block_table(seq, 1).tolist() == [[-1, 4, 5]]
    batch.step(4, release=False)
    assert batch.block_tables[1][0, :4].tolist()[0:2] == [-1, 4]
    batch.step(1)
    assert batch.block_tables[1][0, :2].tolist() == [-1, -1]
    assert (batch.block_tables[0][0, :4] >= 0).all()


def test_a_chunk_goes_when_the_next_one_begins() -> None:
    allocator = BlockAllocator(20, 4)
    batch = allocator.batch(allocator.allocate([0]), chunks=(8,))
    batch.step(7)
    batch.step(1)
    assert batch.block_tables[0][0, :2].tolist() == [0, 1]
    batch.step(1)
    assert batch.block_tables[0][0, :3].tolist() == [-1, -1, 0]


def test_released_blocks_serve_the_same_step() -> None:
    allocator = BlockAllocator(2, 4)
    batch = allocator.batch(allocator.allocate([8]), windows=(4,))
    batch.step()
    assert batch.block_tables[0][0, :3].tolist() == [-1, 1, 0]


def test_a_refused_step_releases_nothing() -> None:
    allocator = BlockAllocator(3, 4)
    seq = allocator.allocate([12])
    batch = allocator.batch(seq, windows=(4,))
    with pytest.raises(OutOfBlocks) as caught:
        batch.step(13)
    assert (caught.value.needed, caught.value.free) == (4, 2)
    assert allocator.block_table(seq).tolist() == [[0, 1, 2]]
    assert allocator.lengths(seq).tolist() == [12]


def test_copies_are_reported_once() -> None:
    allocator = BlockAllocator(20, 4, groups=2)
    parent = allocator.allocate([6])
    batch = allocator.batch([*parent.tolist(), *allocator.fork(parent).tolist()])
    copies = batch.step()
    assert [pairs.tolist() for pairs in copies] == [[[1, 4]], [[3, 5]]]
    assert batch.block_tables[1][:, :2].tolist() == [[2, 5], [2, 3]]
    assert [pairs.shape for pairs in batch.step()] == [(0, 2), (0, 2)]


def test_changes_made_elsewhere_arrive_with_the_next_step() -> None:
    allocator = BlockAllocator(40, 4)
    seqs = allocator.allocate([18, 7])
    batch, other = allocator.batch(seqs), allocator.batch(seqs[:1])
    batch.step()
    other.step(6)
    allocator.truncate(seqs, [5, 5])
    allocator.release_before(seqs[1:], [4])
    batch.step(0)
    assert batch.block_tables[0][:, :4].tolist() == [[0, 1, -1, -1], [-1, 6, -1, -1]]
    assert batch.seq_lens.tolist() == [5, 5]


def test_a_block_exchanged_between_steps_is_written() -> None:
    allocator = BlockAllocator(40, 4)
    seq = allocator.allocate([7])
    batch = allocator.batch(seq)
    batch.step()
    allocator.truncate(seq, [3])
    allocator.allocate([1])
    allocator.append(seq, 5)
    batch.step(0)
    assert batch.block_tables[0][0, :2].tolist() == allocator.block_table(seq)[0].tolist() == [0, 2]


def test_rows_can_be_replaced() -> None:
    allocator = BlockAllocator(40, 4)
    seqs = allocator.allocate([10, 5, 1])
    batch = allocator.batch(seqs)
    batch.step()
    seqs = allocator.select(seqs, [0, 0, 2])
    batch.bind(seqs)
    assert batch.step()[0].tolist() == [[2, 3]]
    assert batch.block_tables[0][:, :3].tolist() == [[0, 1, 3], [0, 1, 2], [5, -1, -1]]
    batch.bind(seqs[1:])
    batch.step()
    assert batch.block_tables[0].shape[0] == 2 and batch.seq_lens.tolist() == [13, 4]
    batch.bind([])
    batch.step()
    assert batch.num_tokens == 0 and batch.cu_seqlens_q.tolist() == [0]


def test_arrays_survive_their_batch_and_allocator() -> None:
    allocator = BlockAllocator(40, 4)
    batch = allocator.batch(allocator.allocate([10]))
    batch.step()
    table = batch.block_tables[0]
    del batch, allocator
    assert table[0, :3].tolist() == [0, 1, 2]


def test_bad_steps_say_why_and_change_nothing() -> None:
    allocator = BlockAllocator(40, 4, groups=2)
    seqs = allocator.allocate([10, 2])
    batch = allocator.batch(seqs)
    batch.step()
    before = allocator.snapshot()
    for arguments, error, text in [
        (([1, 2, 3],), ValueError, "counts must have one entry for each of 2 rows, got 3"),
        (([1, 5], 4), ValueError, r"counts\[1\] must be 0 to 4, got 5"),
        ((-1,), ValueError, r"counts\[0\] must be 0 to 2147483647, got -1"),
        ((1, -1), ValueError, "width must be 0 to 2147483647, got -1"),
        ((1, 2**62), ValueError, "width must be 0 to 2147483647, got 4611686018427387904"),
        ((1, 2**31 - 1), ValueError, "4294967294 tokens are more than 2147483647"),
        ((np.array([0.5, 1]),), TypeError, "counts must be integers, got float64"),
    ]:
        with pytest.raises(error, match=text):
            batch.step(*arguments)
    for windows in [(1,), (1, -1), (1, 2**31)]:
        with pytest.raises(
            ValueError, match="windows must be 0 to 2147483647 for each of 2 groups"
        ):
            batch.set_reach(windows)
    assert allocator.snapshot() == before
    allocator.free(seqs[:1])
    with pytest.raises(UnknownSequence, match=r"step: sequence [0-9]+ in row 0 was freed"):
        batch.step()
