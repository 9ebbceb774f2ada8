"""What an allocator says of itself: stats, integrity, snapshots and clones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pykvcache.allocator import (
    BlockAllocator,
    IntegrityError,
    OutOfBlocks,
    PoolStats,
    SnapshotError,
    UnknownSequence,
)

CHECKSUM_AT, PAYLOAD_AT = 12, 20


def shares(stats: PoolStats) -> dict[str, int]:
    names = ("live", "reserved", "internal", "rounding", "external", "idle")
    return {name: getattr(stats, name) for name in names if getattr(stats, name)}


def test_slack_of_last_blocks_is_internal() -> None:
    allocator = BlockAllocator(10, 4)
    allocator.allocate([5, 8])
    assert shares(allocator.stats()) == {"live": 13, "internal": 3, "idle": 24}
    assert allocator.stats().percent()["live"] == pytest.approx(100 * 13 / 16, abs=1e-5)


def test_shared_tokens_are_live_once() -> None:
    allocator = BlockAllocator(10, 4)
    allocator.fork(allocator.allocate([6]), 3)
    stats = allocator.stats()
    assert shares(stats) == {"live": 6, "internal": 2, "idle": 32}
    assert (stats.sharing_factor, stats.tokens, stats.forks) == (4.0, 24, 3)


def test_live_tokens_of_a_shared_block_are_a_union() -> None:
    allocator = BlockAllocator(4, 8)
    parent = allocator.allocate([8])
    child = allocator.fork(parent)
    allocator.release_before(child, [5])
    allocator.truncate(parent, [2])
    assert shares(allocator.stats()) == {"live": 2 + 3, "internal": 3, "idle": 24}


def test_tokens_out_of_the_window_are_internal_until_their_block_goes() -> None:
    allocator = BlockAllocator(10, 4)
    seq = allocator.allocate([8])
    allocator.release_before(seq, [3])
    assert shares(allocator.stats()) == {"live": 5, "internal": 3, "idle": 32}
    allocator.release_before(seq, [4])
    assert shares(allocator.stats()) == {"live": 4, "idle": 36}


def test_blocks_taken_ahead_and_orphaned_pins_are_reserved() -> None:
    allocator = BlockAllocator(10, 4)
    seq = allocator.allocate([4])
    allocator.reserve(seq, [9])
    assert shares(allocator.stats()) == {"live": 4, "reserved": 8, "idle": 28}
    allocator.pin_sequences(seq)
    allocator.free(seq)
    assert shares(allocator.stats()) == {"reserved": 12, "idle": 28}
    assert allocator.stats().pinned_blocks == 3


def test_layers_that_a_smaller_group_lacks_are_rounding() -> None:
    allocator = BlockAllocator(10, 4, layers=[5, 2])
    allocator.allocate([4])
    stats = allocator.stats()
    assert shares(stats) == {"live": 4 * 7, "rounding": 4 * 3, "idle": 8 * 4 * 5}
    assert stats.group_blocks == (1, 1)


def test_free_blocks_are_external_while_a_refused_request_waits() -> None:
    allocator = BlockAllocator(10, 4)
    seqs = allocator.allocate([12, 16])
    with pytest.raises(OutOfBlocks):
        allocator.allocate([20])
    assert shares(allocator.stats()) == {"live": 28, "external": 12}
    assert allocator.stats().percent()["external"] == 30
    allocator.append(seqs[:1])
    assert shares(allocator.stats())["external"] == 8, "a smaller request is not the one that waits"
    allocator.free(seqs[1:])
    assert shares(allocator.stats()) == {"live": 13, "internal": 3, "idle": 24}
    assert allocator.stats().refusals == 1


def test_a_request_that_no_pool_state_can_meet_does_not_wait() -> None:
    allocator = BlockAllocator(10, 4)
    with pytest.raises(OutOfBlocks):
        allocator.allocate([41])
    assert shares(allocator.stats()) == {"idle": 40}


def test_percentages_sum_to_exactly_100() -> None:
    allocator = BlockAllocator(1000, 7, layers=[3, 5, 7])
    assert allocator.stats().percent()["live"] == 100
    for length in range(1, 60, 3):
        allocator.allocate([length])
        percent = allocator.stats().percent()
        assert sum(percent.values()) == 100 and min(percent.values()) >= 0
        assert 0 < percent["rounding"] < 50


def test_counters_add_up_over_steps() -> None:
    allocator = BlockAllocator(10, 4)
    seq = allocator.allocate([4])
    allocator.append(seq)
    allocator.append(seq)
    child = allocator.fork(seq)
    allocator.append(child)
    stats = allocator.stats()
    assert (stats.steps, stats.block_steps, stats.copies) == (3, 2 + 2 + 3, 1)
    assert (stats.used_blocks, stats.peak_blocks, stats.num_blocks) == (3, 3, 10)


def test_metadata_stays_small() -> None:
    allocator = BlockAllocator(100_000, 16)
    allocator.allocate([1000] * 1500)
    assert allocator.stats().metadata_bytes <= 16 * allocator.num_blocks


@pytest.mark.parametrize("block", [1, 5])
def test_a_wrong_reference_count_is_found(block: int) -> None:
    allocator = BlockAllocator(8, 4)
    allocator.allocate([9])
    allocator._core._damage_refs(block)
    with pytest.raises(IntegrityError, match=f"block {block} has a reference count of "):
        allocator.check_integrity()


def test_a_free_block_with_a_reference_is_found() -> None:
    allocator = BlockAllocator(8, 4)
    allocator.free(allocator.allocate([9]))
    allocator._core._damage_refs(1)
    with pytest.raises(
        IntegrityError, match="block 1 has a reference count of 1, but 0 references"
    ):
        allocator.check_integrity()


def worked() -> tuple[BlockAllocator, list[int]]:
    """An allocator with every kind of state: holes, forks, pins, reserved and free blocks."""
    allocator = BlockAllocator(60, 4, groups=2)
    seqs = allocator.allocate([9, 17, 6, 3]).tolist()
    allocator.release_before(seqs[1:2], 9, group=1)
    allocator.reserve(seqs[2:3], 20)
    allocator.free([seqs.pop(3)])
    allocator.append(seqs, 2)
    allocator.pin_sequences(seqs[:1])
    seqs += allocator.fork(seqs[0], 2).tolist()
    return allocator, seqs


def test_a_snapshot_restores_everything_in_a_new_allocator() -> None:
    allocator, seqs = worked()
    other = BlockAllocator(60, 4, groups=2)
    other.restore(allocator.snapshot())
    other.check_integrity()
    assert other.snapshot() == allocator.snapshot()
    assert other.stats() == replace(allocator.stats(), metadata_bytes=other.stats().metadata_bytes)
    copies = [[pairs.tolist() for pairs in a.append(seqs, 5)] for a in (allocator, other)]
    assert copies[0] == copies[1] and copies[0][0]
    for group in range(2):
        tables = [a.block_table(seqs, group).tolist() for a in (allocator, other)]
        assert tables[0] == tables[1]


def test_restoring_goes_back_and_makes_later_handles_unknown() -> None:
    allocator, seqs = worked()
    snapshot, lengths = allocator.snapshot(), allocator.lengths(seqs).tolist()
    later = allocator.allocate([1])
    allocator.free(seqs[:2])
    allocator.restore(snapshot)
    assert allocator.lengths(seqs).tolist() == lengths
    newest = allocator.allocate([1])
    assert newest[0] != later[0]
    with pytest.raises(UnknownSequence):
        allocator.lengths(later)


def test_a_batch_follows_a_restore() -> None:
    allocator = BlockAllocator(10, 4)
    batch = allocator.batch(allocator.allocate([4]))
    snapshot = allocator.snapshot()
    batch.step()
    assert batch.block_tables[0][0, :2].tolist() == [0, 1]
    allocator.restore(snapshot)
    allocator.allocate([1])
    batch.step()
    assert batch.block_tables[0][0, :2].tolist() == [0, 2]


def test_a_larger_pool_takes_a_smaller_snapshot() -> None:
    small, large = BlockAllocator(4, 4), BlockAllocator(9, 4)
    seq = small.allocate([16])
    large.restore(small.snapshot())
    large.append(seq, 20)
    assert large.num_blocks == 9 and large.num_free == 0
    with pytest.raises(ValueError, match=r"snapshot has 9 blocks, the pool 4: grow\(\) it first"):
        small.restore(large.snapshot())


@pytest.mark.parametrize("other", [BlockAllocator(60, 8, 2), BlockAllocator(60, 4, 3)])
def test_a_snapshot_of_another_geometry_is_refused(other: BlockAllocator) -> None:
    allocator, _ = worked()
    before = other.snapshot()
    with pytest.raises(ValueError, match="snapshot has block_size 4 and 2 groups, the allocator"):
        other.restore(allocator.snapshot())
    assert other.snapshot() == before


def checksum(payload: bytes) -> bytes:
    value = 14695981039346656037
    for byte in payload:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value.to_bytes(8, "little")


def test_any_changed_byte_is_noticed() -> None:
    allocator, _ = worked()
    snapshot = allocator.snapshot()
    for at in range(len(snapshot)):
        damaged = bytearray(snapshot)
        damaged[at] ^= 0x41
        with pytest.raises(SnapshotError):
            allocator.restore(bytes(damaged))
    assert allocator.snapshot() == snapshot


def test_a_wrong_state_is_noticed_even_with_a_right_checksum() -> None:
    """Change each 4-byte word of the payload: what restore() lets in must be consistent."""
    allocator, _ = worked()
    snapshot = allocator.snapshot()
    refused = 0
    assert checksum(snapshot[PAYLOAD_AT:]) == snapshot[CHECKSUM_AT:PAYLOAD_AT]
    for at in range(PAYLOAD_AT, len(snapshot) - 3, 4):
        for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            damaged = bytearray(snapshot)
            damaged[at : at + 4] = value.to_bytes(4, "little")
            damaged[CHECKSUM_AT:PAYLOAD_AT] = checksum(bytes(damaged[PAYLOAD_AT:]))
            target = BlockAllocator(60, 4, groups=2)
            empty = target.snapshot()
            try:
                target.restore(bytes(damaged))
            except (SnapshotError, ValueError):
                refused += 1
                assert target.snapshot() == empty
            target.check_integrity()
            target.stats()
    assert refused > len(snapshot) / 4


@pytest.mark.parametrize("size", [0, 7, 19, 20, 100, -1])
def test_a_cut_snapshot_is_refused(size: int) -> None:
    allocator, _ = worked()
    with pytest.raises(SnapshotError):
        allocator.restore(allocator.snapshot()[:size])


def test_other_versions_and_types_are_refused() -> None:
    allocator, _ = worked()
    snapshot = bytearray(allocator.snapshot())
    snapshot[8] = 99
    with pytest.raises(SnapshotError, match="snapshot has version 99, expected 1"):
        allocator.restore(bytes(snapshot))
    with pytest.raises(TypeError, match="snapshot must be bytes, got str"):
        allocator.restore("text")  # type: ignore[arg-type]


def test_a_clone_is_independent_and_keeps_handles() -> None:
    allocator, seqs = worked()
    tables = allocator.block_table(seqs).tolist()
    clone = allocator.clone()
    allocator.free(seqs)
    assert clone.block_table(seqs).tolist() == tables
    assert (clone.block_size, clone.groups) == (4, 2)
    clone.check_integrity()
    allocator.check_integrity()
