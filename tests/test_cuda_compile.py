"""Every CUDA source compiles without a GPU, and the important kernels do not spill.

Run with `-s` to see registers, shared memory and spills; `python tests/cuda_resources.py` compiles
everything for every architecture, where this leaves some classes of head dims out.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "cuda_resources.py"
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup_cuda.py"))


@pytest.mark.slow
@pytest.mark.skipif(SETUP["find_toolkit"]() is None, reason="there is no CUDA toolkit")
@pytest.mark.parametrize(
    ("arch", "dims"), [("sm_80", (128,)), ("sm_90a", (64, 128)), ("sm_100", (128,))]
)
def test_compiles_without_spills(arch: str, dims: tuple[int, ...]) -> None:
    command = [sys.executable, str(SCRIPT), arch, "--head-dims", *map(str, dims)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("attention") == 0  # no kernel lives in a launcher
    assert done.stdout.count("_kernel<Half, Float8") == 2 * len(dims)
    assert done.stdout.count("registers") == 8 * len(dims) + 28
    wgmma = [line for line in done.stdout.splitlines() if "wgmma_kernel" in line]
    assert len(wgmma) == 2 * len(dims)
    if arch != "sm_90a":  # nothing but a trap
        assert all(int(line.split("registers")[1].split()[0]) < 16 for line in wgmma)


def test_architectures_become_flags() -> None:
    flags = SETUP["gencode_flags"](["8.0", "9.0", "12.0+PTX"])
    assert flags.split() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(SystemExit, match=r"need compute capability 8.0, got 7.5"):
        SETUP["gencode_flags"](["7.5"])


def why_not(version: str | None, toolkit: tuple[int, int] | None, wanted: str = "") -> str | None:
    changes = {
        "torch_cuda_version": lambda _: version,
        "find_toolkit": lambda: Path("toolkit") if toolkit else None,
        "toolkit_version": lambda _: toolkit,
    }
    function = SETUP["why_not"]
    with (
        mock.patch.dict(function.__globals__, changes),
        mock.patch.dict("os.environ", {"PYKVCACHE_CUDA": wanted}),
    ):
        reason: str | None = function(Path("torch"))
        return reason


def test_cuda_is_built_when_torch_and_toolkit_agree() -> None:
    assert why_not("13.0", (13, 1)) is None
    assert why_not("13.0", (13, 1), "0") == "PYKVCACHE_CUDA is 0"
    assert "built without CUDA" in str(why_not(None, (13, 1)))
    assert "no CUDA toolkit" in str(why_not("13.0", None))
    assert "torch has CUDA 12.8 but the toolkit" in str(why_not("12.8", (13, 0)))
    with pytest.raises(SystemExit, match=r"PYKVCACHE_CUDA is 1, but torch has CUDA 12\.8"):
        why_not("12.8", (13, 0), "1")
    with pytest.raises(SystemExit, match="must be unset, 0 or 1"):
        why_not("13.0", (13, 0), "yes")


def test_every_source_is_built() -> None:
    built = {str(source.relative_to(ROOT)) for source, *_ in SETUP["sources"]()}
    files = [file for file in (ROOT / "csrc/cuda").glob("*.c*") if file.suffix != ".cuh"]
    assert built == {str(file.relative_to(ROOT)) for file in files} | {"csrc/python/errors.cpp"}
    from cuda_host import build

    kernels = {name for name, _ in build.kernel_sources(build.HEAD_DIMS)}
    assert kernels | set(build.HOST_SOURCES) == built
    assert SETUP["HEAD_DIMS"] == build.HEAD_DIMS


def test_host_sources_need_no_toolkit() -> None:
    """They are compiled by the host's compiler, which is not told where CUDA's headers are."""
    with mock.patch("setuptools.setup"):
        flags = shlex.split(runpy.run_path(str(ROOT / "setup.py"))["compile_flags"]())
    sources = [source for source, *_ in SETUP["sources"]() if source.suffix == ".cpp"]
    assert sources
    for source in sources:
        command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
