"""Every CUDA source compiles without a GPU, and the important kernels do not spill.

Run with `-s` to see registers, shared memory and spills; `python tests/cuda_resources.py` compiles
everything for every architecture, where this leaves some classes of head dims out.
"""

from __future__ import annotations

import os
import re
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
    flags = SETUP["gencode_flags"](["9.0+PTX", "9.0a", "10.0a+PTX"])
    assert flags.split() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize(
    ("listed", "archs"),
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["8.0", "8.6", "9.0", "10.0", "12.0+PTX"]),
        (" 8.0, 9.0 ; ", ["8.0", "9.0"]),
        ("Turing;Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        ("native;9.0a", ["9.0a", "8.9", "12.0"]),
        ("Volta", []),
        ("Kepler+Tesla Maxwell+Tegra Volta+Tegra", []),
    ],
)
def test_architectures_are_listed_as_torch_takes_them(listed: str, archs: list[str]) -> None:
    function = SETUP["architectures"]
    gpus = {"present_architectures": lambda: ["7.5", "8.9", "12.0"]}
    with (
        mock.patch.dict(function.__globals__, gpus),
        mock.patch.dict("os.environ", {"TORCH_CUDA_ARCH_LIST": listed}),
    ):
        assert function(Path("toolkit")) == archs
        if not archs:
            assert "none has compute capability 8.0" in str(why_not("13.0", (13, 1)))


def test_gpus_that_are_too_old_are_left_out() -> None:
    function = SETUP["architectures"]
    for present, archs in ((["7.0", "7.5"], []), (["7.5", "8.6", "9.0"], ["8.6", "9.0"])):
        with (
            mock.patch.dict(
                function.__globals__, {"present_architectures": lambda found=present: found}
            ),
            mock.patch.dict("os.environ", {"TORCH_CUDA_ARCH_LIST": ""}),
        ):
            assert function(Path("toolkit")) == archs
            if not archs:
                assert "of the GPUs that are here: none has" in str(why_not("13.0", (13, 1)))


@pytest.mark.parametrize(
    ("cxx", "flags"),
    [
        ("c++", "-ccbin c++"),
        ("ccache /opt/gcc/g++", "-ccbin /opt/gcc/g++"),
        ("'/opt/my tools/g++' -m64", "-ccbin '/opt/my tools/g++' -Xcompiler=-m64"),
    ],
)
def test_nvcc_is_told_of_the_compiler_without_its_launcher(cxx: str, flags: str) -> None:
    assert SETUP["host_compiler_flags"](cxx) == flags


def test_paths_with_spaces_stay_whole() -> None:
    function = SETUP["nvcc_flags"]
    with mock.patch.dict(function.__globals__, {"ROOT": Path("/my code")}):
        words = shlex.split(function(Path("/the torch")))
    assert "-I/my code/csrc" in words and "/the torch/include" in words


@pytest.mark.parametrize("listed", ["8", "hopper", "80", "8.0+ptx", "9.0b"])
def test_an_unknown_architecture_is_one_line(listed: str) -> None:
    with pytest.raises(SystemExit, match=r"has '.*'; it takes numbers like 8\.0.*Hopper"):
        SETUP["listed_architectures"](f"8.0 {listed}")


def test_a_toolkit_that_is_named_is_taken_or_missing(tmp_path: Path) -> None:
    def reason() -> str:
        function = SETUP["why_not"]
        changes = {"torch_cuda_version": lambda _: "13.0", "toolkit_version": lambda _: (13, 0)}
        variables = {"CUDA_HOME": str(tmp_path), "PYKVCACHE_CUDA": ""}
        with (
            mock.patch.dict(function.__globals__, changes),
            mock.patch.dict("os.environ", variables),
        ):
            return str(function(Path("torch")))

    (tmp_path / "targets/any/include").mkdir(parents=True)
    (tmp_path / "targets/any/lib").mkdir()
    (tmp_path / "targets/any/include/cuda_runtime.h").touch()
    assert f"CUDA_HOME (or CUDA_PATH) is {tmp_path}" in reason()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    assert reason() == "None"


def test_of_two_toolkits_that_of_torchs_version_is_taken(tmp_path: Path) -> None:
    function = SETUP["find_toolkit"]
    for major in (12, 13):
        folder = tmp_path / f"nvidia/cu{major}"
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/nvcc").touch()
        (folder / "include").mkdir()
        (folder / "include/cuda_runtime.h").touch()

    def version(toolkit: Path) -> tuple[int, int]:
        number = re.fullmatch(r"cu(\d+)", toolkit.name)
        return int(number[1]) if number else 11, 0

    with (
        mock.patch.dict("os.environ", {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": ""}),
        mock.patch("sysconfig.get_path", lambda _: str(tmp_path)),
        mock.patch.dict(function.__globals__, {"toolkit_version": version}),
    ):
        assert function("13.0") == tmp_path / "nvidia/cu13"
        assert function("12.8") == tmp_path / "nvidia/cu12"


def test_nvcc_on_path_comes_before_the_usual_folder(tmp_path: Path) -> None:
    toolkit = tmp_path / "my cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "include/cuda_runtime.h").touch()
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}' >&2\n")
    nvcc.chmod(0o755)
    path = f"{toolkit / 'bin'}:{os.environ['PATH']}"
    with mock.patch.dict("os.environ", {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": path}):
        assert SETUP["find_toolkit"]() == toolkit


def test_the_runtime_is_linked_by_the_name_it_has(tmp_path: Path) -> None:
    flags = SETUP["runtime_link_flags"]
    folder = tmp_path / "targets/any/lib"
    folder.mkdir(parents=True)
    assert flags(tmp_path) == f"-L{folder} -lcudart"
    (folder / "libcudart.so.13").touch()
    assert flags(tmp_path) == f"-L{folder} -l:libcudart.so.13"
    (folder / "libcudart.so").touch()
    assert flags(tmp_path) == f"-L{folder} -lcudart"


def test_the_toolkit_of_pip_is_found(tmp_path: Path) -> None:
    function = SETUP["find_toolkit"]
    folder = tmp_path / "nvidia/cu13"

    def found() -> Path | None:
        with (
            mock.patch.dict("os.environ", {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": ""}),
            mock.patch("sysconfig.get_path", lambda _: str(tmp_path)),
        ):
            toolkit: Path | None = function()
            return toolkit

    elsewhere = found()  # in a usual folder of this machine
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    assert found() == elsewhere  # torch brings headers without a compiler
    (folder / "bin").mkdir()
    (folder / "bin/nvcc").touch()
    assert found() == (elsewhere or folder)


def why_not(version: str | None, toolkit: tuple[int, int] | None, wanted: str = "") -> str | None:
    changes = {
        "torch_cuda_version": lambda _: version,
        "find_toolkit": lambda _: Path("toolkit") if toolkit else None,
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
