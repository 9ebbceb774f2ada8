"""`pykvcache replay`: its rows, the published figures beside them, Ctrl-C, help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench.replay import paper
from pykvcache.bench.replay import plan as plan_module
from pykvcache.bench.replay.cases import BLOCK_SIZES, CONTIGUOUS, Case
from pykvcache.bench.replay.totals import BESIDE, KEYS, SHARES


def test_all_policies_as_json(run_small) -> None:
    code, out, err = run_small("--memory", "8GiB", "--model-config", "llama-3.1-8b", "--json", "-")
    rows = json.loads(out)
    assert code == 0
    assert [row["policy"] for row in rows] == [*CONTIGUOUS, "padded", *["paged"] * len(BLOCK_SIZES)]
    assert [row["block_size"] for row in rows if row["policy"] == "paged"] == list(BLOCK_SIZES)
    for row in rows:
        assert tuple(row) == (*KEYS, *BESIDE)
        assert sum(row[name] for name in SHARES) == 100
        assert row["throughput"] > 0
    assert "65,536 token slots (8 GiB of llama-3.1-8b, 128 KiB a token)" in err
    assert "oracle-first-fit" in err and "Better packing" in err


def test_table_and_file(run_small, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    code, out, err = run_small(
        *("--trace", "azure-code", "--tokens", "20000", "--policy", "max,paged"),
        *("--block-size", "16", "--block-size", "64,1", "--json", str(rows)),
    )
    assert code == 0 and err == ""
    assert "paged 64" in out and "20,000 token slots" in out and "padded" not in out
    assert [row["block_size"] for row in json.loads(rows.read_text())] == [None, 16, 64, 1]


def test_head_room_changes_what_stays_free(run_small) -> None:
    external = []
    for share in ("0", "0.3"):
        arguments = ("--policy", "paged", "--block-size", "16", "--tokens", "30000", "--json", "-")
        _, out, _ = run_small(*arguments, "--head-room", share)
        external.append(json.loads(out)[0]["external"])
    assert external[1] > external[0] + 15


def test_cost_of_a_step_changes_time_and_not_order(run_small) -> None:
    rows = []
    for step in ("6", "12"):
        arguments = ("--policy", "max", "--tokens", "30000", "--kv-ns", "0", "--prefill-us", "0")
        _, out, _ = run_small(*arguments, "--step-ms", step, "--json", "-")
        rows.append(json.loads(out)[0])
    assert rows[0]["throughput"] == pytest.approx(2 * rows[1]["throughput"])
    assert rows[0]["live"] == pytest.approx(rows[1]["live"])


@pytest.mark.parametrize("tokens", ["1", "2", "7"])
def test_budgets_that_hold_next_to_nothing(run_small, tokens: str) -> None:
    code, out, _ = run_small("--tokens", tokens, "--json", "-")
    assert code == 0
    for row in json.loads(out):
        assert sum(row[name] for name in SHARES) == 100
        assert row["block_size"] is None or row["block_size"] <= int(tokens)


def test_ctrl_c_keeps_what_is_done(
    run_small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_case = plan_module.run_case

    def interrupted(case: Case, *arguments):
        if case.policy == "oracle-buddy":
            raise KeyboardInterrupt
        return run_case(case, *arguments)

    monkeypatch.setattr(plan_module, "run_case", interrupted)
    rows = tmp_path / "rows.json"
    code, out, err = run_small("--json", str(rows))
    assert code == 130 and err == "pykvcache: interrupted\n"
    assert "oracle-first-fit" in out and "oracle-buddy" not in out
    assert len(json.loads(rows.read_text())) == 3


def test_ctrl_c_before_the_first_row_keeps_an_old_file(
    run_small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_module, "run_case", interrupted)
    rows = tmp_path / "rows.json"
    rows.write_text("[1]")
    assert run_small("--json", str(rows))[0] == 130
    assert rows.read_text() == "[1]"


def test_paper_prints_published_figures_beside(run) -> None:
    code, out, _ = run("--paper", "--requests", "300")
    assert code == 0
    assert "15,728 token slots (12 GiB of opt-13b, 800 KiB a token); max-len 2,048" in out
    for published in paper.PUBLISHED.values():
        assert str(published) in out
    assert "sigma 1.4" in out and "Alpaca" in out and "waste of allocated" in out


def test_help_has_an_example_and_every_option(run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "Example: python -m pykvcache replay" in out
    for option in ("trace", "memory", "model-config", "tokens", "max-len", "policy", "block-size"):
        assert f"--{option}" in out
    for option in ("head-room", "requests", "arrivals", "plot", "json", "step-ms", "paper"):
        assert f"--{option}" in out
