"""Everything that only a GPU can tell, in one command: build, tests, sanitizers, measurements.

    python -m benchmarks.on_gpu --folder results-gpu [--steps build,tests,...]

Uses the Python that runs it, which needs pykvcache's dependencies but not pykvcache installed.
Every step is a process with a time limit; one that fails or runs out of time does not stop the
others. Logs and JSON results go to the folder. Exits with 1 if a step failed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pykvcache.cli import run, single

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZED = (
    *PYTEST, "tests/test_paged_attention.py", "tests/test_cache_ops.py",
    "-k", "cuda and (test_write_then or (test_case and (mixed or splits or fp8-head)))",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command: {python} and {folder} are filled in.

    Attributes:
        seconds: its time limit.
        hopper: only for GPUs of compute capability 9.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    hopper: bool = False


STEPS = (
    Step("build", 240, ("{python}", "setup.py", "--quiet", "build_ext", "--inplace")),
    Step("info", 60, ("{python}", "-m", "pykvcache", "info")),
    Step(
        "tests",
        240,
        (*PYTEST, "-n", "6", "--timeout", "120", "tests/test_paged_attention.py",
         "tests/test_cache_ops.py", "tests/test_contract.py", "tests/test_triton.py"),
    ),
    Step("graphs", 240, (*PYTEST, "-n", "3", "--timeout", "200", "tests/test_gpu.py")),
    Step("models", 360, (*PYTEST, "-n", "8", "--timeout", "200", "tests/hf")),
    Step("engine", 360, (*PYTEST, "-n", "8", "--timeout", "200", "tests/engine")),
    Step("wgmma", 180, (*PYTEST, "--timeout", "60", "tests/test_cuda_wgmma.py"), hopper=True),
    Step("memcheck", 240, ("compute-sanitizer", "--tool", "memcheck", *SANITIZED)),
    Step("racecheck", 240, ("compute-sanitizer", "--tool", "racecheck", *SANITIZED)),
    Step(
        "kernels",
        240,
        ("{python}", "-m", "benchmarks.kernels", "--quick", "--json", "{folder}/kernels.json"),
    ),
    Step(
        "wgmma-speed",
        120,
        ("{python}", "-m", "benchmarks.kernels", "--quick", "--phases", "prefill", "--dtypes",
         "bf16", "--wgmma", "--json", "{folder}/wgmma.json"),
        hopper=True,
    ),
    Step("steps", 120, ("{python}", "-m", "benchmarks.engine_overhead", "--json",
                        "{folder}/engine-overhead.json")),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a step; `last` is the last line that it printed."""

    name: str
    state: str  # "passed", "failed", "timed out" or "skipped"
    seconds: float
    last: str


def perform(step: Step, folder: Path) -> Outcome:
    """Run one step; its output goes to <folder>/<name>.log."""
    command = [part.format(python=sys.executable, folder=folder) for part in step.command]
    if step.hopper and not is_hopper():
        return Outcome(step.name, "skipped", 0.0, "not a GPU of compute capability 9")
    if shutil.which(command[0]) is None:
        return Outcome(step.name, "skipped", 0.0, f"there is no {command[0]}")
    log = folder / f"{step.name}.log"
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            state = "failed" if process.wait(step.seconds) else "passed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers too, and after Ctrl-C
            process.wait()
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Outcome(step.name, state, time.monotonic() - begin, last)


def is_hopper() -> bool:
    """Whether the GPU, if there is one, has compute capability 9."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def choose(names: str) -> Sequence[Step]:
    """The steps of a comma-separated list, in their own order; all for an empty one."""
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = wanted - {step.name for step in STEPS}
    if unknown:
        raise typer.BadParameter(
            f"--steps has {', '.join(sorted(unknown))}; there are "
            f"{', '.join(step.name for step in STEPS)}"
        )
    return [step for step in STEPS if not wanted or step.name in wanted]


def on_gpu(
    folder: Annotated[Path, typer.Option(help="Where logs and results go.")] = Path("results-gpu"),
    steps: Annotated[str, typer.Option(help="Some of them, with commas; default all.")] = "",
) -> None:
    """Build, test, check and measure on a GPU.

    Example: python -m benchmarks.on_gpu --folder results-gpu --steps build,tests
    """
    chosen = choose(steps)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False)
    outcomes = []
    try:
        for step in chosen:
            console.print(f"{step.name} (at most {step.seconds} s) ...")
            outcomes.append(perform(step, folder))
    finally:  # Ctrl-C keeps what is done
        table = Table("step", "state", "seconds", "last line")
        for outcome in outcomes:
            table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.0f}", outcome.last)
        console.print(table)
    if any(outcome.state in ("failed", "timed out") for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(run(single(on_gpu)))
