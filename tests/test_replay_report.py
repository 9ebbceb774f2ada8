"""What `python -m pykvcache replay` says beside its shares: rules, waste, stars, notes."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest

from pykvcache.bench.replay import plots
from pykvcache.bench.replay.cases import BLOCK_SIZES
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.totals import SHARES, Result
from pykvcache.bench.replay.workload import Workload

SMALL = ("--requests", "120")


@pytest.fixture
def run(run_command):
    """Run `pykvcache replay ...`: (exit code, standard output, standard error)."""
    return partial(run_command, "replay")


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
def test_what_becomes_of_a_rest_is_told(run, arguments: list[str], rule: str) -> None:
    code, out, _ = run(*SMALL, "--tokens", "9000", "--policy", "pow2,oracle", *arguments)
    assert code == 0 and "rest of 808 slots" in out and f"(buddy-rest {rule})" in out


def test_naming_the_default_of_max_len_changes_nothing(run) -> None:
    arguments = (*SMALL, "--tokens", "30000", "--policy", "pow2,oracle", "--json", "-")
    _, rows, err = run(*arguments)
    longest = err.partition("max-len ")[2].split()[0].replace(",", "")
    assert run(*arguments, "--max-len", longest)[1] == rows


def test_printed_rows_sum_to_100(run) -> None:
    _, out, _ = run(*SMALL, "--tokens", "30000")
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


def test_the_waste_of_a_sequence_stands_beside_its_closed_form(run, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    _, out, _ = run(*SMALL, "--policy", "max,paged", "--block-size", "8,64", "--json", str(path))
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


def test_more_than_packing_is_not_called_packing(run) -> None:
    options = ("--requests", "60", "--trace", "mooncake-conv", "--memory", "40GiB")
    options += ("--policy", "max,paged", "--block-size", "16")
    _, out, _ = run(*options, "--prefix-cache")
    text = " ".join(out.split())
    assert "Better packing" not in out
    assert "Paging with the engine's scheduler and prefix hits of" in text
    assert "which is more than packing" in text
    assert "Better packing" in run(*options)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "max", "--block-size", "77"], ["--block-size", "paged is not replayed"]),
        (
            ["--policy", "paged", "--block-size", "16", "--token-budget", "9"],
            ["--scheduler engine"],
        ),
        (["--policy", "paged", "--block-size", "16", "--swap-us", "9"], ["--swap-us", "swapped"]),
        (["--policy", "max", "--sigma", "2", "--seed", "1"], ["--seed, --sigma", "random"]),
        (["--policy", "max", "--buddy-rest", "lost"], ["--buddy-rest", "no buddy"]),
        (["--policy", "max", "--tokens", "9000", "--model-config", "opt-13b"], ["is the budget"]),
    ],
)
def test_options_without_effect_are_named(run, arguments: list[str], words: list[str]) -> None:
    code, out, _ = run(*SMALL, *arguments)
    text = " ".join(out.split())
    assert code == 0 and "without effect: --" in text
    for word in words:
        assert word in text


def test_no_word_about_options_that_count(run) -> None:
    options = ("--preemption", "swap", "--swap-us", "4", "--victim", "cheapest")
    code, out, _ = run(*SMALL, "--policy", "paged", "--block-size", "16", *options)
    assert code == 0 and "without effect" not in out
    assert "cheapest preempted (swap and 4 us a token one way)" in " ".join(out.split())
    code, out, _ = run(*SMALL, "--policy", "paged", "--block-size", "16", "--scheduler", "engine")
    assert code == 0 and "newest" not in out and "cheapest preempted" in out
