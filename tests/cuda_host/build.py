"""Builds the CUDA backend as host C++, once for each state of the sources.

`emulation()` is the extension module with its operators on CPU tensors; `driver()` is a program
without torch that runs small cases, for sanitizers. Results lie in build/cuda_host/ under a hash of
everything that went into them, so processes of one test run share them.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "cuda_host"
HEAD_DIMS = (64, 128, 256)
HOST_SOURCES = (
    *(f"csrc/cuda/{name}" for name in ("attention.cu", "cache_ops.cu", "explain.cu", "module.cpp")),
    "csrc/python/errors.cpp",
)
CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = "-std=c++20 -g1 -fPIC -fno-math-errno -Wall -Wextra -Wno-unknown-pragmas -DKV_CUDA_HOST"

Source = tuple[str, str]  # file, extra flags


def kernel_sources(head_dims: tuple[int, ...]) -> list[Source]:
    """The .cu files that hold kernels and no torch header."""
    sources = [("csrc/cuda/plain_kernels.cu", ""), ("csrc/cuda/cache_kernels.cu", "")]
    for dim in head_dims:
        for phase in ("decode", "prefill", "wgmma"):
            sources.append((f"csrc/cuda/{phase}_kernels.cu", f"-DKV_HEAD_DIM={dim}"))
    return sources


def digest(*parts: str) -> str:
    """A hash of the sources that any build may include, and of `parts`."""
    digest = hashlib.sha256("\0".join((*CXX, FLAGS, torch.__version__, *parts)).encode())
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "tests/cuda_host").glob("*")]
    for file in sorted(files):
        if file.suffix in (".h", ".cuh", ".cu", ".cpp") and "allocator" not in file.parts:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:20]


def _compile(sources: list[Source], target: str, flags: str, link: str) -> Path:
    """Compile and link into build/cuda_host/<hash>/<target>, unless it is there."""
    folder = FOLDER / digest(target, flags, link, *(f"{s} {extra}" for s, extra in sources))
    if (folder / target).exists():
        return folder / target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not (folder / target).exists():
            commands, objects = [], []
            for i, (source, extra) in enumerate(sources):
                objects.append(folder / f"{i}.o")
                commands.append(
                    [*CXX, *FLAGS.split(), *flags.split(), *extra.split(), f"-I{ROOT / 'csrc'}",
                     f"-I{ROOT / 'tests'}", "-x", "c++", "-c", str(ROOT / source),
                     "-o", str(objects[-1])]
                )  # fmt: skip
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, commands))
            linked = folder / f"{target}.new"
            run([*CXX, *map(str, objects), *link.split(), "-o", str(linked)])
            for file in objects:
                file.unlink()
            linked.rename(folder / target)
    return folder / target


def run(command: list[str]) -> None:
    """Run a compiler; RuntimeError with its message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def extension(defines: str = "") -> Path:
    """The emulated `_C_cuda`."""
    torch_folder = Path(torch.__file__).parent
    sources = [
        *kernel_sources(HEAD_DIMS),
        *((name, "") for name in HOST_SOURCES),
        ("tests/cuda_host/control.cpp", ""),
    ]
    flags = (
        f"-O1 -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 {defines} "
        f"-isystem {torch_folder / 'include'} -isystem {sysconfig.get_path('include')}"
    )
    link = f"-shared -L{torch_folder / 'lib'} -ltorch_cpu"
    return _compile(sources, "_C_cuda.so", flags, link)


def driver(flags: str) -> Path:
    """A program that runs tests/cuda_host/driver.cpp's cases, with `flags` for its compiler."""
    sources = [*kernel_sources(HEAD_DIMS[:1]), ("tests/cuda_host/driver.cpp", "")]
    flags += f" -DKV_LARGEST_HEAD_DIM={HEAD_DIMS[0]}"
    return _compile(sources, "driver", flags, f"{flags} -pthread")


def hopper_models() -> Path:
    """A program that checks the models of mbarrier, TMA and wgmma on their own."""
    return _compile([("tests/cuda_host/hopper_models.cpp", "")], "hopper_models", "-O1", "")


def shared_bytes() -> Path:
    """A program that prints the shared memory of each kernel."""
    return _compile([("tests/cuda_host/shared_bytes.cpp", "")], "shared_bytes", "-O0", "")


@functools.cache
def emulation(defines: str = "") -> ModuleType:
    """The emulated `_C_cuda`, imported: its operators are those of namespace pykvcache_cuda."""
    path = str(extension(defines))
    loader = importlib.machinery.ExtensionFileLoader("pykvcache._C_cuda", path)
    spec = importlib.util.spec_from_loader("pykvcache._C_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["pykvcache._C_cuda"] = module
    return module


@functools.cache
def control(defines: str = "") -> ctypes.CDLL:
    """tests/cuda_host/control.cpp of the loaded emulation."""
    library = ctypes.CDLL(str(extension(defines)))
    library.kv_emulation_bank_conflicts.restype = ctypes.c_uint64
    library.kv_emulation_matrix_products.restype = ctypes.c_uint64
    library.kv_emulation_warpgroup_products.restype = ctypes.c_uint64
    return library


def load(defines: str = "") -> str:
    """What operators.LOADERS["cuda"] does on a GPU, for the emulation."""
    from pykvcache import operators

    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler ({CXX[0]})"
    module = emulation(defines)
    operators.check_signatures(module.signatures(), "cuda")
    operators.name_bad_arguments("cuda", module.take_bad_argument)
    return "ready"
