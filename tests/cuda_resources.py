"""Compile the CUDA sources without a GPU and print what each kernel needs of the chip.

    python tests/cuda_resources.py [sm_80 sm_90a sm_100] [--head-dims 64 128 256]

One line a kernel: registers, static and dynamic shared memory, spilled bytes. Exits with 1, and
says why in the last lines, if something does not compile, if a kernel for head dims 64 or 128
spills, if one asks for more shared memory than a chip has on which it runs, or if ptxas waits for
wgmma products one by one (its notes C75xx).
Launchers are compiled against the installed torch, whatever that was built for. Needs nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cuda_host import build

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
MAY_SPILL = ("256",)
ONLY_ON = {"wgmma_kernel": "sm_90a"}  # elsewhere its body is empty and nobody launches it
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10}  # of a CTA, at most


def compile_source(nvcc: str, arch: str, source: str, extra: str, flags: list[str]) -> str:
    """ptxas' report; raises RuntimeError with nvcc's message."""
    number = arch.removeprefix("sm_")
    with tempfile.NamedTemporaryFile(suffix=".o") as out:
        command = [
            nvcc, *flags, *extra.split(), f"-gencode=arch=compute_{number},code={arch}",
            "-Xptxas=-v", "-c", str(ROOT / source), "-o", out.name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source} {extra} for {arch}:\n{done.stdout}{done.stderr}")
    return done.stderr


def kernels_in(report: str) -> list[tuple[str, int, int, int]]:
    """(name<types>, registers, static shared bytes, spilled bytes) of each kernel in a report."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores"
        r".*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    names = subprocess.run(
        ["c++filt"], input="\n".join(name for name, *_ in found), capture_output=True, text=True,
        check=True,
    ).stdout.splitlines()  # fmt: skip
    rows = []
    for name, (_, spilled, registers, rest) in zip(names, found, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|pykvcache::(cuda::)?", "", name)
        short = re.sub(r"^void |\(\w+\)$", "", short)
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append((short, int(registers), int(shared[1]) if shared else 0, int(spilled)))
    return rows


def dynamic_shared_bytes() -> dict[tuple[str, str], int]:
    """Of (kernel, head dim): what the launchers ask for."""
    program = build.shared_bytes()
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^(.*) (\d+) (\d+)$", lines, re.MULTILINE)
    return {(kernel, dim): int(size) for kernel, dim, size in rows}


def find_nvcc() -> tuple[str, list[str]] | None:
    """nvcc and the flags that setup.py gives it; None if there is no toolkit."""
    setup = runpy.run_path(str(ROOT / "setup_cuda.py"))
    toolkit = setup["find_toolkit"]()
    if toolkit is None:
        return None
    flags = shlex.split(setup["nvcc_flags"](Path(torch.__file__).parent))
    return str(toolkit / "bin" / "nvcc"), flags


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--head-dims", nargs="*", type=int, default=list(build.HEAD_DIMS))
    options = parser.parse_args(arguments)
    found = find_nvcc()
    if found is None:
        print("no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set")
        return 2
    sources = build.kernel_sources(tuple(options.head_dims))
    sources += [(name, "") for name in build.HOST_SOURCES if name.endswith(".cu")]
    jobs = [(arch, *source) for arch in options.architectures for source in sources]
    shared = dynamic_shared_bytes()
    bad: list[str] = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        reports = [pool.submit(compile_source, found[0], *job, found[1]) for job in jobs]
        for (arch, _, extra), report in zip(jobs, reports, strict=True):
            dim = extra.removeprefix("-DKV_HEAD_DIM=")
            try:
                kernels = kernels_in(report.result())
            except RuntimeError as error:
                bad.append(str(error))
                continue
            for note in re.findall(r"\(C75\d\d\)[^\n]*", report.result()):
                bad.append(f"{arch} {extra}: {note}")
            for name, registers, static, spilled in kernels:
                plain_name = name.split("<")[0]
                size = static + shared.get((name, dim), shared.get((plain_name, "0"), 0))
                line = (
                    f"{arch:7} {name:42} {dim:>4} registers {registers:3} "
                    f"shared {size:6} spilled {spilled}"
                )
                print(line, flush=True)
                room = SHARED_BYTES.get(arch, 227 << 10)
                if size > room and ONLY_ON.get(plain_name, arch) == arch:
                    bad.append(f"MORE shared memory than {room} bytes: {line}")
                if spilled > 0 and dim not in MAY_SPILL:
                    bad.append(f"SPILLS: {line}")
    print("\n".join([*bad, f"{len(bad)} problems"]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
