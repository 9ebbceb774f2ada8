"""Compile the Triton kernels for GPUs that are not here; print what each needs of the chip.

    python tests/triton_resources.py [sm_90 gfx942 ...] [--quick | --rest]

One line a kernel: shared memory, registers and spilled bytes (of the cubin, read with the cuobjdump
that Triton brings, or of AMD's code object). Exits with 1 if a kernel does not compile, asks for
more shared memory than the chip has, or spills though it is plain, or has scales, and its head dim
is 64 or 128 (float32 aside, which has no tensor cores). Triton's cache is not used.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
os.environ["PYKVCACHE_LAUNCH_TABLE"] = "none"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is when unset, without a warning

import triton
from triton_launches import TARGETS, Launch
from triton_matrix import attention_calls, launches_of, quick_calls

KIB = 1024
SHARED_BYTES = {
    "sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB,
    "sm_120": 99 * KIB,
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel."""

    shared: int
    registers: int
    spilled: int

    def __str__(self) -> str:
        return f"shared {self.shared:6} registers {self.registers:3} spilled {self.spilled}"


def resources(compiled: Any) -> Resources:
    """Read from the machine code."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
        spills = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[-1])
        return Resources(shared, registers, 4 * spills)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return Resources(shared, int(registers), int(stack))


def may_spill(arch: str, name: str, launch: Launch) -> bool:
    """Whether a spill is let pass."""
    if arch == "sm_120":  # its launches are those of any chip: they have to fit, no more
        return True
    if launch.name not in ("decode_kernel", "prefill_kernel"):
        return False
    words = name.split()
    changed = [word for word in words[3:] if not word.startswith("scales=")]
    return bool(changed) or words[1].startswith("fp32") or words[2] not in ("64", "128")


def report(arch: str, name: str, launch: Launch) -> tuple[str, bool]:
    """One line about a kernel, and whether it is good."""
    begin = time.perf_counter()
    head = f"{arch} {launch.name} {name}"
    try:
        needs = resources(launch.compile(arch))
    except Exception as error:
        return f"{head}: {type(error).__name__}: {str(error)[-1500:]}", False
    wrong = []
    if needs.shared > SHARED_BYTES[arch]:
        wrong.append(f"MORE SHARED MEMORY THAN {SHARED_BYTES[arch]}")
    if needs.spilled and not may_spill(arch, name, launch):
        wrong.append("SPILLS")
    line = f"{head:74} {needs} {time.perf_counter() - begin:5.1f} s {' '.join(wrong)}"
    return line.rstrip(), not wrong


def chosen_launches(arch: str, quick: bool, rest: bool) -> list[tuple[str, Launch]]:
    few = launches_of(arch, list(quick_calls(arch))) if quick or rest else {}
    if quick:
        return list(few.values())
    every = launches_of(arch, list(attention_calls()))
    return [launch for key, launch in every.items() if key not in few]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(TARGETS))
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="a part that takes a minute a chip")
    part.add_argument("--rest", action="store_true", help="what --quick leaves out")
    parser.add_argument("--only", default="", help="kernels whose line has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    jobs = [
        (arch, name, launch)
        for arch in options.architectures
        for name, launch in chosen_launches(arch, options.quick, options.rest)
        if options.only in f"{arch} {launch.name} {name}"
    ]
    triton.knobs.compilation.always_compile = True
    failed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, get_context("fork")) as pool,
    ):
        triton.knobs.cache.dir = folder
        global _jobs
        _jobs = jobs  # functions do not pickle; a forked process has them
        for line, good in pool.map(_report, range(len(jobs))):
            print(line, flush=True)
            failed += not good
    print(f"{len(jobs)} kernels compiled, {failed} failed")
    return int(failed > 0)


_jobs: list[tuple[str, str, Launch]] = []


def _report(number: int) -> tuple[str, bool]:
    return report(*_jobs[number])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
