"""`pykvcache bench kernels`: its file, comparison and plots, wrong results, Ctrl-C."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from pykvcache.bench import kernels, peaks, tensors
from pykvcache.bench.cases import Case
from pykvcache.bench.timing import WrongResult

kernels_command = importlib.import_module("pykvcache.cli.bench.kernels")  # not the function


def test_kernels_saves_compares_and_draws(run_kernels, tmp_path: Path) -> None:
    first, folder = tmp_path / "first.json", tmp_path / "plots"
    code, out, err = run_kernels("--json", str(first), "--plot", str(folder))
    assert code == 0, err
    assert "paged 16" in out and "% of read" in out and "% of GEMM" in out
    saved = json.loads(first.read_text())
    assert {"commit", "versions", "cpu", "threads"} <= set(saved["environment"])
    row = next(r for r in saved["results"] if r["contender"] == "paged 16")
    assert row["gb_per_second"] == pytest.approx(row["rate"] / 1e9)
    assert row["intensity"] == pytest.approx(2 * 2 / 4)  # group of 2, float32
    for name in ("roofline", "decode-by-context", "decode-by-block-size"):
        assert (folder / f"{name}.png").stat().st_size > 10_000

    code, out, err = run_kernels("--compare", str(first), "--fail-above", "1000000")
    assert code == 0, err
    assert "new / old" in out and "warning" not in out
    for row in saved["results"]:
        row["median"], row["p10"], row["p90"] = (row[k] / 1e6 for k in ("median", "p10", "p90"))
    saved["environment"]["cpu"] = "another"
    first.write_text(json.dumps(saved))
    code, out, _ = run_kernels("--compare", str(first), "--fail-above", "1.1")
    assert code == 1
    assert "slower" in out and "warning: other device" in out and "'another'" in out


def test_rows_dtypes_and_heads_are_chosen(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 2**20)
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**16)
    options = "--phases decode --heads gqa8 --dtypes fp16,fp8 --rows 1x64+2x32,1x64"
    more = "--threads 1 --seconds 0.01 --block-sizes 1 --device cpu --peers none --json -"
    code, out, err = run("kernels", *options.split(), *more.split())
    assert code == 0 and "1x64+2x32" in err, err
    rows = json.loads(out)["results"]
    assert {row["heads"] for row in rows} == {"gqa8"}
    assert "paged 1" in {row["contender"] for row in rows}
    found = {(row["dtype"], row["batch"], row["length"], row.get("mixed")) for row in rows}
    sizes = [(3, 64, "1x64+2x32"), (1, 64, None)]
    assert found == {(dtype, *size) for dtype in ("fp16", "fp8") for size in sizes}


def test_no_figure_of_a_wrong_result(run_kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self) -> None:
        raise WrongResult("paged 16 is off by 1")

    monkeypatch.setattr(kernels.Workload, "check", wrong)
    code, out, err = run_kernels()
    assert code == 1 and "paged 16 is off by 1" in err
    assert "% of read" not in out


def test_cases_before_a_wrong_result_are_saved(
    run_kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = kernels.Workload.check

    def wrong_later(self) -> None:
        if self.case.batch == 2:
            raise WrongResult("paged 16 is off by 1")
        check(self)

    monkeypatch.setattr(kernels.Workload, "check", wrong_later)
    saved = tmp_path / "rows.json"
    code, out, err = run_kernels("--json", str(saved))
    assert code == 1 and "paged 16 is off by 1" in err and "% of read" not in out
    rows = json.loads(saved.read_text())["results"]
    assert {(row["batch"], row["length"]) for row in rows} == {(1, 64), (1, 128)}


def test_interrupt_keeps_what_is_done(
    run_kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = kernels.measure

    def stops(case: Case, *args, **kwargs):
        if case.batch == 2:
            raise KeyboardInterrupt
        yield from measure(case, *args, **kwargs)

    monkeypatch.setattr(kernels_command, "measure", stops)
    saved = tmp_path / "rows.json"
    code, out, _ = run_kernels("--json", str(saved))
    assert code == 130 and "interrupted" in out
    rows = json.loads(saved.read_text())["results"]
    assert {row["batch"] for row in rows} == {1}
