"""Bad calls, corrupted counts, many requests, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from prefix_samples import count, serve, serve_and_end

from pykvcache.allocator import (
    BlockAllocator,
    IntegrityError,
    UnknownSequence,
)

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
