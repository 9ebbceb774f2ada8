"""`pytest benchmarks --benchmark-only`: quick kernel cases, checked first, cold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pykvcache import ops
from pykvcache.bench import gpu
from pykvcache.bench.cases import Case, select
from pykvcache.bench.kernels import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16
CASES = [case for case in select(quick=True) if case.batch == 1]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for a busy core would be what is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def workload(request: pytest.FixtureRequest) -> Workload:
    """Raises WrongResult, and so fails, when a contender is wrong."""
    case: Case = request.param
    backend = ops.table("auto", DEVICE).backend
    found = Workload(case, [BLOCK_SIZE], [backend], DEVICE)
    found.check()
    return found


@pytest.mark.parametrize("contender", ["baseline", f"paged {BLOCK_SIZE}"])
def test_attention(benchmark: Any, workload: Workload, contender: str) -> None:
    run = workload.contenders[workload.baseline if contender == "baseline" else contender]
    numbers = itertools.count()
    if DEVICE == "cuda":
        benchmark(lambda: gpu.elapsed(run, next(numbers), 1))
    else:
        benchmark(lambda: run(next(numbers)))
    case = workload.case
    median = benchmark.stats.stats.median if benchmark.stats else None
    if median:
        benchmark.extra_info["GB/s of KV"] = case.kv_bytes / median / 1e9
        benchmark.extra_info["GFLOP/s"] = case.flops / median / 1e9
