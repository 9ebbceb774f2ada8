"""`pytest benchmarks --benchmark-only`: the block allocator, called from Python and inside C++."""

from __future__ import annotations

from typing import Any

import pytest

from pykvcache.bench.allocator import CALLS, Pool, time_inside

NUM_BLOCKS = 1_000_000


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(NUM_BLOCKS)


@pytest.mark.parametrize("name", CALLS)
def test_call(benchmark: Any, pool: Pool, name: str) -> None:
    benchmark(CALLS[name], pool)


def test_inside(benchmark: Any) -> None:
    rows = benchmark.pedantic(time_inside, args=(NUM_BLOCKS, 5), rounds=3)
    benchmark.extra_info.update({row.operation: row.timing.median for row in rows})
