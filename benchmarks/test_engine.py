"""`pytest benchmarks --benchmark-only`: a small batch of requests through the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pykvcache
from pykvcache.bench import models
from pykvcache.bench.throughput import check_tokens

LENGTHS = (16, 30, 80, 200, 50, 130, 20, 64)
NEW_TOKENS = 16


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for a busy core would be what is timed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 1000, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def engine(prompts: list[list[int]]) -> pykvcache.Engine:
    """Raises WrongResult, and so fails, when its tokens are not those of `generate`."""
    model = models.build_llama(128, 256, 2, 4, 2, 1000)
    check_tokens(model, prompts)
    model.float()
    return pykvcache.Engine(model, memory="64MiB", prefix_cache=False)


def test_requests(benchmark: Any, engine: pykvcache.Engine, prompts: list[list[int]]) -> None:
    outputs = benchmark(lambda: engine.generate(prompts, max_new_tokens=NEW_TOKENS, progress=False))
    assert all(len(output.token_ids) == NEW_TOKENS for output in outputs)
