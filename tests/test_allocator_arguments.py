"""Arguments of BlockAllocator: what integers may come as, and bad ones, which change nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pykvcache.allocator import BlockAllocator, DoubleFree, UnknownBlock, UnknownSequence

KINDS: dict[str, Callable[[list[int]], object]] = {
    "list": list,
    "tuple": tuple,
    "int64": lambda values: np.array(values, np.int64),
    "int32": lambda values: np.array(values, np.int32),
    "uint8": lambda values: np.array(values, np.uint8),
    "strided": lambda values: np.array([values, values]).T[:, 0],
    "tensor": lambda values: torch.tensor(values),
    "int32 tensor": lambda values: torch.tensor(values, dtype=torch.int32),
    "numpy scalars": lambda values: [np.int64(value) for value in values],
}


@pytest.mark.parametrize("kind", KINDS)
def test_integers_may_come_as(kind: str) -> None:
    allocator = BlockAllocator(50, 4)
    seqs = allocator.allocate(KINDS[kind]([3, 0, 9]))
    allocator.append(torch.from_numpy(seqs), KINDS[kind]([1, 2, 3]))
    assert allocator.lengths(seqs.tolist()).tolist() == [4, 2, 12]
    allocator.truncate(tuple(seqs.tolist()), 2)
    assert allocator.lengths(seqs).dtype == np.int32
    assert allocator.block_table(seqs).dtype == np.int32
    assert seqs.dtype == np.int64 and torch.from_numpy(seqs).shape == (3,)


def test_an_empty_batch_is_legal() -> None:
    allocator = BlockAllocator(4, 4)
    none = allocator.allocate([])
    assert none.shape == (0,) and allocator.block_table(none).shape == (0, 0)
    assert allocator.append([], [])[0].shape == (0, 2)
    assert allocator.select([], []).shape == (0,)
    allocator.free(none)


Call = Callable[[BlockAllocator, int, int], object]
BAD_CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "negative length": (
        lambda a, seq, gone: a.allocate([1, -1]),
        ValueError,
        r"allocate: lengths\[1\] must be 0 to 2147483647, got -1",
    ),
    "negative count": (
        lambda a, seq, gone: a.append([seq], [-3]),
        ValueError,
        r"append: counts\[0\] must be 0 to 2147483647, got -3",
    ),
    "length overflow": (
        lambda a, seq, gone: a.append([seq], 2**31 - 1),
        ValueError,
        "row 0 would have 2147483652 tokens, more than 2147483647",
    ),
    "number of counts": (
        lambda a, seq, gone: a.append([seq], [1, 2]),
        ValueError,
        "counts must have one entry for each of 1 rows, got 2",
    ),
    "append twice": (
        lambda a, seq, gone: a.append([seq, seq], 1),
        ValueError,
        "row 1 is in the batch twice",
    ),
    "free twice": (
        lambda a, seq, gone: a.free([seq, seq]),
        ValueError,
        "row 1 is in the batch twice",
    ),
    "truncate to more": (
        lambda a, seq, gone: a.truncate([seq], 9),
        ValueError,
        r"truncate: lengths\[0\] is 9, but the sequence has 5 tokens",
    ),
    "group": (
        lambda a, seq, gone: a.block_table([seq], 2),
        ValueError,
        "group must be 0 to 1, got 2",
    ),
    "negative group": (
        lambda a, seq, gone: a.release_before([seq], 1, -1),
        ValueError,
        "group must be 0 to 1, got -1",
    ),
    "index": (
        lambda a, seq, gone: a.select([seq], [1]),
        ValueError,
        r"select: index\[0\] must be 0 to 0, got 1",
    ),
    "negative n": (
        lambda a, seq, gone: a.fork([seq], -1),
        ValueError,
        "fork: n must be 0 to 2147483647, got -1",
    ),
    "too many forks": (
        lambda a, seq, gone: a.fork([seq], 2**24),
        ValueError,
        "at most 16777216 sequences may be alive at once",
    ),
    "slots before the start": (
        lambda a, seq, gone: a.slot_mapping([seq], 6),
        ValueError,
        r"slot_mapping: counts\[0\] is 6, but the sequence has 5 tokens",
    ),
    "more than the width": (
        lambda a, seq, gone: a.slot_mapping([seq], 3, width=2),
        ValueError,
        r"slot_mapping: counts\[0\] must be 0 to 2, got 3",
    ),
    "negative width": (
        lambda a, seq, gone: a.slot_mapping([seq], 3, width=-1),
        ValueError,
        "slot_mapping: width must be 0 to 2147483647, got -1",
    ),
    "nested list": (
        lambda a, seq, gone: a.free([[seq]]),
        TypeError,
        r"seqs must be integers, got \[\d+\]",
    ),
    "two dimensions": (
        lambda a, seq, gone: a.free(np.array([[seq]])),
        ValueError,
        r"seqs must have one dimension, got shape \[1, 1\]",
    ),
    "beyond 64 bits": (
        lambda a, seq, gone: a.allocate([2**70]),
        ValueError,
        "lengths must fit 64 bits, got 1180591620717411303424",
    ),
    "float array": (
        lambda a, seq, gone: a.append([seq], np.array([1.0])),
        TypeError,
        "counts must be integers, got float64",
    ),
    "float": (
        lambda a, seq, gone: a.append([seq], [1.5]),
        TypeError,
        "counts must be integers, got 1.5",
    ),
    "bool array": (
        lambda a, seq, gone: a.append([seq], np.array([True])),
        TypeError,
        "counts must be integers, got bool",
    ),
    "text": (lambda a, seq, gone: a.free("all"), TypeError, "seqs must be integers, got <U3"),
    "None": (lambda a, seq, gone: a.free(None), TypeError, "seqs must be integers, got object"),
    "foreign": (
        lambda a, seq, gone: a.append(BlockAllocator(1, 1).allocate([0])),
        UnknownSequence,
        "append: sequence [0-9]+ in row 0 does not belong to this allocator",
    ),
    "made up": (
        lambda a, seq, gone: a.lengths([seq, 7]),
        UnknownSequence,
        "lengths: sequence 7 in row 1 does not belong to this allocator",
    ),
    "negative handle": (
        lambda a, seq, gone: a.free([-1]),
        UnknownSequence,
        "free: sequence -1 in row 0 does not belong to this allocator",
    ),
    "zero": (
        lambda a, seq, gone: a.free([0]),
        UnknownSequence,
        "free: sequence 0 in row 0 does not belong to this allocator",
    ),
    "freed before": (
        lambda a, seq, gone: a.free([seq, gone]),
        DoubleFree,
        "free: sequence [0-9]+ in row 1 was freed or replaced before",
    ),
    "use after free": (
        lambda a, seq, gone: a.fork([seq, gone]),
        UnknownSequence,
        "fork: sequence [0-9]+ in row 1 was freed or replaced before",
    ),
    "no such block": (
        lambda a, seq, gone: a.pin([64]),
        UnknownBlock,
        "pin: block 64 is not in the pool of 64",
    ),
    "negative block": (
        lambda a, seq, gone: a.unpin([-1]),
        UnknownBlock,
        "unpin: block -1 is not in the pool of 64",
    ),
    "free block": (
        lambda a, seq, gone: a.pin([0, 60]),
        UnknownBlock,
        "pin: block 60 is free",
    ),
    "unpinned block": (
        lambda a, seq, gone: a.unpin([1, 0]),
        DoubleFree,
        "unpin: block 0 is pinned 0 times, not 1",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_why_and_change_nothing(name: str) -> None:
    call, error, text = BAD_CALLS[name]
    allocator = BlockAllocator(64, 4, groups=2)
    seq, gone = allocator.allocate([5, 9]).tolist()
    allocator.free([gone])
    allocator.pin([1])
    before = allocator.snapshot()
    with pytest.raises(error, match=f"{text}$") as caught:
        call(allocator, seq, gone)
    assert type(caught.value) is error
    assert allocator.snapshot() == before
    allocator.check_integrity()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 16), ValueError, "num_blocks must be 1 to 2147483647, got 0"),
        ((2**31, 16), ValueError, "num_blocks must be 1 to"),
        ((4, 0), ValueError, "block_size must be 1 to 65536, got 0"),
        ((4, -1), ValueError, "block_size must be 1 to 65536, got -1"),
        ((4, 16, 0), ValueError, "groups must be 1 to 1024, got 0"),
        ((4, 16, 1, [3, 2]), ValueError, "groups is 1 but layers has 2 entries"),
        ((4, 16, None, [3, 0]), ValueError, "groups must have at least one layer each, got 0"),
        ((4.5, 16), TypeError, "integer"),
        (("4", 16), TypeError, "integer"),
    ],
)
def test_bad_sizes(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BlockAllocator(*arguments)
