"""Everything that only a GPU can tell, in one command: build, tests, sanitizers, measurements.

    python -m benchmarks.on_gpu --folder results-gpu [--steps build,tests,...]

Uses the Python that runs it, which needs pykvcache's dependencies but not pykvcache installed.
Every step is a process with a time limit; one that fails or runs out of time does not stop the
others, and measurements that run out of time keep the cases that are done. Logs and JSON results go
to the folder. Exits with 1 if a step failed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pykvcache.cli import run, single

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider")
KERNELS = ("{python}", "-m", "benchmarks.kernels")
LAST_WORDS = 20  # seconds that a step has to save what it measured when its time is over

# Few, because a sanitizer makes a kernel 10 to 50 times slower; all of backend "cuda". By name, so
# that one that is gone is an error. Cases: decode, cut or not, and prefill, of all head dim classes
# and groups of heads; blocks of 1 and 3; float8 with scales; kernels without tensor cores.
SANITIZED_CASES = (
    "decode-bfloat16", "prefill-bfloat16", "prefill-float16", "long-among-short-bfloat16",
    "speculative-bfloat16", "group-8-bfloat16", "group-64-bfloat16", "dim-80-bfloat16",
    "dim-128-bfloat16", "dim-256-bfloat16", "block-1-bfloat16", "block-3-bfloat16",
    "holes-bfloat16", "everything-bfloat16", "fp8-head-bfloat16", "fp8-slot-bfloat16",
    "scale-head-bfloat16", "mixed-float32", "latent-bfloat16", "fp8-channel-bfloat16",
)  # fmt: skip
SANITIZED_CACHE_OPS = (
    "write_then_gather_is_identity[3-dtype1-HND-cuda]",
    "write_then_gather_is_identity[16-dtype2-NHD-cuda]",
    "write_skips_minus_one[cuda]",
    "write_without_values[cuda]",
    *(f"quantised_write_keeps_values_within_a_rounding[{kind}-cuda]"
      for kind in ("scalar", "head", "slot", "channel")),
    "slot_mapping_of_padding_holes_and_spare_tokens[cuda]",
    "gather_gives_zeros_in_holes[cuda]",
    "copy_blocks[dtype2-cuda]",
    "copy_between_pools_of_different_size[cuda]",
    "merge_ignores_empty_partials[dtype2-cuda]",
)  # fmt: skip
SANITIZED = (
    *(f"tests/test_paged_attention.py::test_case[{case}-cuda]" for case in SANITIZED_CASES),
    "tests/test_paged_attention.py::test_deterministic_rows_do_not_depend_on_the_batch"
    "[mixed-bfloat16-cuda]",
    *(f"tests/test_cache_ops.py::test_{name}" for name in SANITIZED_CACHE_OPS),
    *(f"tests/bench/test_partitions.py::test_every_partition_is_right[{dtype}-cuda]"
      for dtype in ("bf16", "fp8")),
)  # fmt: skip
SANITIZED_WGMMA = tuple(
    f"tests/test_cuda_wgmma.py::test_many_tiles[{case}-late]"
    for case in (
        "dim-128-bfloat16", "dim-128-fp16-float16", "dim-80-bfloat16", "dim-256-bfloat16",
        "group-7-bfloat16", "window-holes-bfloat16", "padded-bfloat16", "block-32-bfloat16",
        "block-2-dim-128-holes-bfloat16",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command: {python} and {folder} are filled in.

    Attributes:
        seconds: its time limit.
        hopper: only for GPUs of compute capability 9.
        variables: added to the environment.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    hopper: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


def sanitizer(name: str, tool: str, tests: tuple[str, ...], hopper: bool = False) -> Step:
    """Tests under a tool of compute-sanitizer.

    It exits with 0 in spite of errors unless told otherwise, and sees the tensors as torch's
    allocator cuts them out of larger pieces unless that keeps none.
    """
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST, *tests)
    return Step(name, 240, command, hopper, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def measurement(name: str, seconds: int, *options: str, hopper: bool = False) -> Step:
    """`bench kernels` with these options; rows go to <folder>/<name>.json."""
    return Step(name, seconds, (*KERNELS, *options, "--json", f"{{folder}}/{name}.json"), hopper)


# First whether it is right, kernels before models; then the rows of the table of GPU goals.
STEPS = (
    Step("build", 240, ("{python}", "setup.py", "--quiet", "build_ext", "--inplace")),
    Step("info", 60, ("{python}", "-m", "pykvcache", "info")),
    Step(
        "tests",
        240,
        (*PYTEST, "-n", "6", "--timeout", "120", "tests/test_paged_attention.py",
         "tests/test_cache_ops.py", "tests/test_contract.py", "tests/test_triton.py",
         "tests/bench/test_partitions.py"),
    ),
    Step("wgmma", 180, (*PYTEST, "--timeout", "60", "tests/test_cuda_wgmma.py"), hopper=True),
    sanitizer("memcheck", "memcheck", SANITIZED),
    sanitizer("racecheck", "racecheck", SANITIZED),
    sanitizer("wgmma-memcheck", "memcheck", SANITIZED_WGMMA, hopper=True),
    sanitizer("wgmma-racecheck", "racecheck", SANITIZED_WGMMA, hopper=True),
    Step("graphs", 240, (*PYTEST, "-n", "3", "--timeout", "200", "tests/test_gpu.py")),
    Step("models", 360, (*PYTEST, "-n", "8", "--timeout", "200", "tests/hf")),
    Step("engine", 360, (*PYTEST, "-n", "8", "--timeout", "200", "tests/engine")),
    measurement(
        "decode", 420, "--phases", "decode", "--heads", "gqa,gqa8", "--dtypes", "bf16",
        "--rows", "1x4096,32x4096,32x8192", "--block-sizes", "1,16,64",
    ),
    measurement(
        "decode-fp8", 240, "--phases", "decode", "--heads", "gqa,gqa8", "--dtypes", "fp8",
        "--rows", "32x8192,32x16384", "--block-sizes", "1,16,64",
    ),
    measurement(
        "decode-short", 300, "--phases", "decode", "--heads", "gqa,gqa8", "--dtypes", "bf16,fp16",
        "--rows", "1x1024", "--block-sizes", "16",
    ),
    measurement(
        "decode-mixed", 240, "--phases", "decode", "--heads", "gqa,gqa8", "--dtypes", "bf16",
        "--rows", "1x131072+31x4096", "--block-sizes", "16",
    ),
    measurement(
        "prefill", 300, "--phases", "prefill", "--heads", "gqa", "--dtypes", "bf16,fp16",
        "--rows", "1x2048,1x8192", "--block-sizes", "1,16,64",
    ),
    measurement(
        "prefill-wgmma", 180, "--phases", "prefill", "--heads", "gqa", "--dtypes", "bf16",
        "--rows", "1x2048,1x8192", "--block-sizes", "1,16,64", "--wgmma", hopper=True,
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
            env={**os.environ, "PYTHONPATH": str(ROOT), **step.variables},
        )  # fmt: skip
        try:
            state = "failed" if process.wait(step.seconds) else "passed"
        except subprocess.TimeoutExpired:
            state = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
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
