"""The command for machines with a GPU: its steps, on a machine that may have none."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pykvcache import ops
from pykvcache.bench.cases import Case
from pykvcache.cli import run, single

ROOT = Path(__file__).resolve().parents[2]

SLEEPS = ("sh", "-c", "sleep 600 & echo $! > {folder}/child; wait")
SAVES = ("sh", "-c", "trap 'echo saved; exit 130' INT; sleep 600 & wait")


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
        Step("saves", 1, SAVES),
        Step("fine", 60, ("sh", "-c", "echo in $PYTHONPATH $MORE"), variables={"MORE": "and"}),
    )
    monkeypatch.setattr(on_gpu, "STEPS", steps)
    monkeypatch.setattr("sys.argv", ["on_gpu", "--folder", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "200")
    assert run(single(on_gpu.on_gpu)) == 1
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "│" in line]
    states = {name.strip(): state.strip() for name, state, _ in rows}
    assert states == {
        "wrong": "failed", "slow": "timed out", "absent": "skipped", "saves": "timed out",
        "fine": "passed",
    }  # fmt: skip
    assert (tmp_path / "wrong.log").read_text() == "it broke\n"
    assert (tmp_path / "fine.log").read_text() == f"in {ROOT} and\n"
    assert (tmp_path / "saves.log").read_text() == "saved\n"
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
                assert (ROOT / part.partition("::")[0]).exists(), part


@pytest.mark.skipif(ops.backends()["cuda"] != "ready", reason="needs backend cuda")
def test_sanitizers_have_tests(on_gpu: ModuleType) -> None:
    """pytest stops with an error when it finds no test of a name."""
    names = {*on_gpu.SANITIZED, *on_gpu.SANITIZED_WGMMA}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *sorted(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    found = {line for line in done.stdout.splitlines() if "::" in line}
    assert done.returncode == 0 and found == names, done.stdout + done.stderr


def test_errors_that_a_sanitizer_finds_fail_its_step(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tool of this test finds an error, and exits with what it was told to."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\ntest "$3" = --error-exitcode && exit "$4"\nexit 0\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(on_gpu, "is_hopper", lambda: True)
    steps = [step for step in on_gpu.STEPS if step.command[0] == "compute-sanitizer"]
    assert {step.name for step in steps} == {
        "memcheck", "racecheck", "wgmma-memcheck", "wgmma-racecheck"
    }  # fmt: skip
    for step in steps:
        assert on_gpu.perform(step, tmp_path).state == "failed"
        assert step.variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_measurements_are_those_of_the_goals(
    on_gpu: ModuleType, run_command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their options are right, they fit ten minutes, and no goal is left out."""
    command = importlib.import_module("pykvcache.cli.bench.kernels")
    measured: list[tuple[Case, int]] = []

    def measure(case: Case, block_sizes: list[int], *args: object) -> list[object]:
        measured.extend((case, size) for size in block_sizes)
        return []

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "check_memory", lambda *args: None)
    monkeypatch.setattr(command, "check_wgmma", lambda *args: None)
    for step in on_gpu.STEPS:
        assert step.seconds <= 540
        if step.command[: len(on_gpu.KERNELS)] == on_gpu.KERNELS:
            options = [part.format(folder=tmp_path) for part in step.command[3:]]
            code, _, err = run_command("bench", "kernels", *options, "--device", "cpu")
            assert code == 0, err
    decode = [
        (case.heads.group, case.dtype_name, size)
        for case, size in measured
        if case.phase == "decode" and case.kv_bytes >= 2**29 and not case.mixed
    ]
    wanted = itertools.product((4, 8), ("bf16", "fp8"), (1, 16, 64))
    assert set(decode) == set(wanted)
    names = {case.name for case, size in measured if size == 16}
    assert {
        "decode gqa bf16 B=1 L=1024", "decode gqa fp16 B=1 L=1024",
        "decode gqa bf16 B=32 L=1x131072+31x4096", "decode gqa8 bf16 B=32 L=1x131072+31x4096",
        "prefill gqa bf16 B=1 L=2048", "prefill gqa bf16 B=1 L=8192",
    } <= names  # fmt: skip
