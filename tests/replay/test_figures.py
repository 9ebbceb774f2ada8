"""Figures of a replay against the closed form, published ones and some by hand; its own memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from pykvcache.bench.replay.cases import Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.traces import Request


@pytest.mark.parametrize("trace", ["azure-conv", "azure-code", "sharegpt", "sharegpt-like"])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_waste_per_sequence_is_the_closed_form(trace: str, block_size: int) -> None:
    workload = Workload(trace, max_len=16384, limit=2500)
    result = run_case(Case("paged", block_size), workload, 65536, 16384, Rules())
    assert result.waste_per_sequence == pytest.approx((block_size - 1) / 2, rel=0.05)


def test_waste_of_rows_shorter_than_a_block_is_the_rest_of_it() -> None:
    workload = Workload("alpaca-like", max_len=250, limit=2500)
    result = run_case(Case("paged", 256), workload, 65536, 250, Rules())
    held = result.window.live / result.window.rows
    assert result.waste_per_sequence == pytest.approx(256 - held)
    assert result.waste_per_sequence > 1.3 * 127.5


def paper(case: Case, sigma: float = 1.0, trace: str = "sharegpt-like") -> Result:
    """OPT-13B in 12 GiB: Kwon et al., SOSP 2023, figure 2."""
    workload = Workload(trace, max_len=2048, limit=6000, sigma=sigma)
    return run_case(case, workload, 15_728, 2048, Rules(buddy_rest="lost"))


@pytest.mark.parametrize(
    ("case", "published"),
    [
        (Case("max-length"), 20.4),
        (Case("power-of-two"), 26.8),
        (Case("oracle-buddy"), 38.2),
        (Case("paged", 16), 96.3),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_published_useful_shares(case: Case, published: float) -> None:
    assert paper(case).shares()["live"] == pytest.approx(published, abs=4)


def test_waste_of_allocated_blocks_and_where_it_is_not_small() -> None:
    assert paper(Case("paged", 16)).waste_of_allocated < 4
    assert paper(Case("paged", 16), trace="alpaca-like").waste_of_allocated > 4


def test_padded_batches_by_hand() -> None:
    """Rows of 2 + 3 and 4 + 1 tokens in 12 slots; the third does not fit and waits."""
    requests = [Request(2, 3), Request(4, 1), Request(6, 1)]
    cost = StepCost(1.0, 0.0, 0.0)
    result = run_case(Case("padded"), requests, 12, 8, Rules(cost))
    # Steps 0 to 2 hold 2 x 4, 2 x 5 and 2 x 6 slots; live 2 + 4, then 3, then 4.
    assert result.shares() == pytest.approx(
        {
            "live": 100 * 13 / 36,
            "reserved": 0,
            "internal": 100 * 17 / 36,
            "rounding": 0,
            "external": 100 * 6 / 36,
        },
        abs=1e-4,
    )
    assert result.seconds.total == 4
    assert (result.peak_batch, result.output_tokens, result.throughput) == (2, 5, 1.25)
    assert result.mean_batch == pytest.approx(4 / 3)


def test_shares_are_of_used_memory_when_nobody_waits() -> None:
    requests = [Request(10, 6, 100.0 * i) for i in range(3)]
    result = run_case(Case("paged", 16), requests, 1600, 16, Rules(saturated=False))
    shares = result.shares()
    assert result.waiting.seconds == 0
    assert shares["external"] == 0 and shares["live"] > 60
    assert result.seconds.idle > 190


def test_what_cannot_be_held_is_refused_and_counted() -> None:
    requests = [Request(700, 100), Request(10, 10)]
    result = run_case(Case("paged", 300), requests, 1000, 800, Rules())
    assert (result.refused, result.requests) == (0, 2)
    result = run_case(Case("paged", 400), requests, 799, 799, Rules())
    assert (result.refused, result.requests) == (1, 1)
    result = run_case(Case("oracle-buddy"), requests, 1000, 800, Rules())
    assert (result.refused, result.requests) == (1, 1)


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    generator = random.Random(0)
    peaks = []
    for count in (300, 3000):
        path = tmp_path / f"{count}.csv"
        lines = [f"{generator.randint(1, 50)},{generator.randint(1, 50)}" for _ in range(count)]
        path.write_text("\n".join(["input_length,output_length", *lines]) + "\n")
        workload = Workload(str(path))
        run_case(Case("paged", 16), workload, 1024, 100, Rules())
        tracemalloc.start()
        run_case(Case("paged", 16), workload, 1024, 100, Rules())
        run_case(Case("oracle-buddy"), workload, 1024, 100, Rules())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000
