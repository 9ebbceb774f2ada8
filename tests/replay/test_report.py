"""The tables: rounding, the waste of a sequence, stars, notes, narrow terminals."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from pykvcache.bench.replay import paper, plots
from pykvcache.bench.replay.cases import BLOCK_SIZES
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.report import replay_tables
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.totals import BESIDE, KEYS, SHARES, Result
from pykvcache.bench.replay.workload import Workload


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--max-len", "2000"], "used"),
        (["--max-len", "2000", "--buddy-rest", "lost"], "lost"),
        (["--max-len", "2000", "--trace", "sharegpt-like"], "lost"),
        (["--max-len", "2000", "--trace", "alpaca-like"], "lost"),
        (["--max-len", "2000", "--trace", "alpaca-like", "--buddy-rest", "used"], "used"),
    ],
)
def test_what_becomes_of_a_rest_is_told(run_small, arguments: list[str], rule: str) -> None:
    code, out, _ = run_small("--tokens", "9000", "--policy", "pow2,oracle", *arguments)
    assert code == 0 and "rest of 808 slots" in out and f"(buddy-rest {rule})" in out


def test_naming_the_default_of_max_len_changes_nothing(run_small) -> None:
    arguments = ("--tokens", "30000", "--policy", "pow2,oracle", "--json", "-")
    _, rows, err = run_small(*arguments)
    longest = err.partition("max-len ")[2].split()[0].replace(",", "")
    assert run_small(*arguments, "--max-len", longest)[1] == rows


def test_printed_rows_sum_to_100(run_small) -> None:
    _, out, _ = run_small("--tokens", "30000")
    rows = [line.split() for line in out.splitlines() if line.startswith(("max-", "p", "oracle"))]
    shares = [row[2 if row[0] == "paged" else 1 :][:5] for row in rows if len(row) > 10]
    assert len(shares) == 4 + 1 + len(BLOCK_SIZES)
    for row in shares:
        assert sum(int(share.replace(".", "")) for share in row) == 1000


@pytest.mark.parametrize("live", [1 / 3, 0.2, 0.00049, 0.99949, 1.0, 0.0])
def test_rounding_moves_no_share_by_a_tenth(live: float) -> None:
    result = Result("paged", 16, 3)
    rest = 3 * (1 - live)
    result.waiting.seconds, result.waiting.live = 1.0, 3 * live
    result.waiting.allocated = 3 * live + 0.75 * rest
    result.waiting.internal, result.waiting.rounding = 0.25 * rest, 0.15 * rest
    shares, printed = result.shares(), result.printed_shares()
    for name in SHARES:
        assert abs(float(printed[name]) - shares[name]) < 0.1
    assert printed["live"] == f"{math.floor(10 * shares['live'] + 0.5) / 10:.1f}"
    assert sum(int(share.replace(".", "")) for share in printed.values()) == 1000


def test_the_waste_of_a_sequence_stands_beside_its_closed_form(run_small, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    _, out, _ = run_small("--policy", "max,paged", "--block-size", "8,64", "--json", str(path))
    for row in json.loads(path.read_text())[1:]:
        size, waste = row["block_size"], row["waste_per_sequence"]
        assert waste == pytest.approx((size - 1) / 2, rel=0.2)
        held = f"{row['tokens_per_sequence']:,.0f}"
        assert ["paged", str(size), f"{waste:.1f}", f"{(size - 1) / 2:.1f}", held] in [
            line.split() for line in out.splitlines()
        ]


def test_rows_of_another_denominator_are_marked(run, tmp_path: Path) -> None:
    """Slots of the longest make requests wait; blocks hold all of them at once."""
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n" + "10,5\n" * 20 + "900,100\n")
    options = ("--trace", str(path), "--tokens", "4000", "--policy", "max,paged")
    _, out, _ = run(*options, "--block-size", "16", "--head-room", "0")
    assert "paged 16 *" in out and "max-length *" not in out and "% of the budget" in out
    assert "* no request waited for paged 16" in out
    plan = Plan.of(Workload(str(path)), Budget(4000), Rules(head_room=0), ["max", "paged"], [16])
    results = list(plan.run())
    assert "* share of the allocated part" in plots.axis_label(results)
    assert "*" not in plots.axis_label(results[:1]) + plots.axis_label(results[1:])
    _, out, _ = run("--trace", str(path), "--policy", "paged", "--block-size", "16")
    assert "% of allocated" in out and "paged 16 *" not in out


def test_enough_memory_is_no_waste(run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    _, out, _ = run(
        *("--trace", "azure-conv", "--requests", "20", "--arrivals", "trace"),
        *("--policy", "paged", "--block-size", "16", "--memory", "80GiB", "--json", str(rows)),
    )
    assert "no request ever waited" in out
    (row,) = json.loads(rows.read_text())
    assert tuple(row) == (*KEYS, *BESIDE, "shares_of") and row["shares_of"] == "allocated"


@pytest.mark.parametrize("width", [120, 80, 60, 40, 25])
def test_no_figure_is_cut_in_a_narrow_terminal(width: int) -> None:
    workload = Workload("azure-conv", limit=60)
    plan = Plan.of(workload, Budget(30_000), paper.Rules(), ["max", "oracle-first-fit", "paged"])
    results = list(plan.run())
    regimes = [paper.Regime(f"sigma {i}", results[-4:]) for i in range(6)]
    console = Console(width=width, file=io.StringIO())
    made = replay_tables(results, width)
    for table in [*made, *paper.paper_tables(regimes, width)]:
        console.print(table)
    text = console.file.getvalue()
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    words = text.split()
    for result in results:
        assert set(result.printed_shares().values()) < set(words)
        assert f"{result.mean_batch:.1f}" in words
        assert f"{result.throughput:,.0f}" in words and result.policy in words
    assert {"live", "reserved", "external", "preempt", "tokens/s", "published"} <= set(words)
    assert len(made) == {120: 2, 80: 3}.get(width, len(made))
