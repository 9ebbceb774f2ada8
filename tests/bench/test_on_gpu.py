"""The command for machines with a GPU: its steps, on a machine that may have none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from pykvcache.cli import run, single

ROOT = Path(__file__).resolve().parents[2]

SLEEPS = ("sh", "-c", "sleep 600 & echo $! > {folder}/child; wait")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.on_gpu")


def test_steps_do_not_stop_each_other(
    on_gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Step = on_gpu.Step
    steps = (
        Step("wrong", 60, ("sh", "-c", "echo it broke; exit 3")),
        Step("slow", 1, SLEEPS),
        Step("absent", 60, ("no-such-program",)),
        Step("fine", 60, ("sh", "-c", "echo in $PYTHONPATH")),
    )
    monkeypatch.setattr(on_gpu, "STEPS", steps)
    monkeypatch.setattr("sys.argv", ["on_gpu", "--folder", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "200")
    assert run(single(on_gpu.on_gpu)) == 1
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "│" in line]
    states = {name.strip(): state.strip() for name, state, _ in rows}
    assert states == {
        "wrong": "failed", "slow": "timed out", "absent": "skipped", "fine": "passed",
    }  # fmt: skip
    assert (tmp_path / "wrong.log").read_text() == "it broke\n"
    assert (tmp_path / "fine.log").read_text() == f"in {ROOT}\n"
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "status"
    assert not child.exists() or "zombie" in child.read_text()


def test_steps_are_chosen_by_name(on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [step.name for step in on_gpu.choose("info, build")] == ["build", "info"]
    monkeypatch.setattr("sys.argv", ["on_gpu", "--steps", "tests,nonsense"])
    assert run(single(on_gpu.on_gpu)) == 2


def test_files_of_the_steps_are_there(on_gpu: ModuleType) -> None:
    for step in on_gpu.STEPS:
        for part in step.command:
            if part.startswith("tests/"):
                assert (ROOT / part).exists(), part
