"""What setup.py needs to know to build pykvcache._C_cuda: whether, with which nvcc, for which GPUs.

PYKVCACHE_CUDA unset: built when torch is a CUDA build and a toolkit of the same major version is
there, else skipped with a reason; 0: never; 1: what is missing is an error. TORCH_CUDA_ARCH_LIST
names the GPUs, as for torch's own extensions. No GPU has to be there.
"""

from __future__ import annotations

import glob
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HEAD_DIMS = (64, 128, 256)  # classes that the tensor-core kernels are compiled for
SMALLEST_ARCH = (8, 0)
# Names that torch's own extensions take. Those before Ampere are of GPUs that are left out.
NAMED_ARCHS = {
    "Kepler": "3.5", "Kepler+Tesla": "3.7", "Maxwell": "5.0", "Maxwell+Tegra": "5.3",
    "Pascal": "6.0", "Volta": "7.0", "Volta+Tegra": "7.2", "Turing": "7.5",
    "Ampere": "8.0 8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX", "Blackwell+Tegra": "11.0",
}  # fmt: skip

LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # of compilers


def _is_toolkit(folder: Path) -> bool:
    headers = [folder / "include", *folder.glob("targets/*/include")]
    return (folder / "bin" / "nvcc").exists() and any(
        (headers_of / "cuda_runtime.h").exists() for headers_of in headers
    )


def named_toolkit() -> str | None:
    """What the environment says where the toolkit is."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_toolkit(cuda: str | None = None) -> Path | None:
    """The folder that holds bin/nvcc and the headers: the one that is named, or a usual one, best
    of the major version of `cuda`, torch's."""
    if named := named_toolkit():
        return Path(named).resolve() if _is_toolkit(Path(named)) else None
    candidates = []
    if nvcc := shutil.which("nvcc"):
        # The one on PATH may be a script that calls another: ask it where it runs from.
        plan = subprocess.run([nvcc, "-dryrun", "-E", "-x", "cu", os.devnull], capture_output=True,
                              text=True)  # fmt: skip
        candidates += [top.strip() for top in re.findall(r"TOP=(.+)", plan.stderr)]
    candidates.append("/usr/local/cuda")
    candidates += sorted(glob.glob(sysconfig.get_path("purelib") + "/nvidia/cu[0-9]*"))  # pip's
    found = [Path(folder).resolve() for folder in candidates if _is_toolkit(Path(folder))]
    if cuda and len(found) > 1:
        major = int(cuda.split(".")[0])
        found.sort(key=lambda folder: toolkit_version(folder)[0] != major)  # stable
    return found[0] if found else None


def host_compiler_flags(cxx: str) -> str:
    """What nvcc is told of the C++ compiler: it takes neither launchers nor options as one word."""
    words = shlex.split(cxx)
    while len(words) > 1 and Path(words[0]).name in LAUNCHERS:
        words = words[1:]
    options = [shlex.quote(f"-Xcompiler={option}") for option in words[1:]]
    return " ".join([f"-ccbin {shlex.quote(words[0])}", *options])


def runtime_link_flags(toolkit: Path) -> str:
    """Where libcudart lies and its name: toolkits of NVIDIA, conda and pip differ in the folder,
    and pip's has no libcudart.so, only the libcudart.so.13 that it stands for."""
    folders = [toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))]
    flags = [f"-L{shlex.quote(str(folder))}" for folder in folders if folder.is_dir()]
    versioned = [file.name for folder in folders for file in folder.glob("libcudart.so.*")]
    usual = any((folder / "libcudart.so").exists() for folder in folders)
    return " ".join([*flags, "-lcudart" if usual or not versioned else f"-l:{min(versioned)}"])


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    text = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    major, minor = re.findall(r"release (\d+)\.(\d+)", text)[0]
    return int(major), int(minor)


def torch_cuda_version(torch_dir: Path) -> str | None:
    """ "12.8", or None for a CPU build; read without importing torch."""
    version: str | None = runpy.run_path(str(torch_dir / "version.py"))["cuda"]
    return version


def why_not(torch_dir: Path) -> str | None:
    """Why `_C_cuda` is not built; None if it is. Raises SystemExit if PYKVCACHE_CUDA=1."""
    wanted = os.environ.get("PYKVCACHE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"pykvcache: PYKVCACHE_CUDA must be unset, 0 or 1, got {wanted!r}")
    reason = "PYKVCACHE_CUDA is 0" if wanted == "0" else _missing(torch_dir)
    if reason and wanted == "1":
        raise SystemExit(f"pykvcache: PYKVCACHE_CUDA is 1, but {reason}")
    return reason


def _missing(torch_dir: Path) -> str | None:
    version = torch_cuda_version(torch_dir)
    if version is None:
        return "the installed torch is built without CUDA"
    toolkit = find_toolkit(version)
    if toolkit is None and (named := named_toolkit()):
        return f"CUDA_HOME (or CUDA_PATH) is {named}, which has no bin/nvcc or no headers"
    if toolkit is None:
        return f"there is no CUDA toolkit (torch has CUDA {version}); set CUDA_HOME"
    major = toolkit_version(toolkit)[0]
    if major != int(version.split(".")[0]):
        return f"torch has CUDA {version} but the toolkit in {toolkit} is CUDA {major}"
    if not architectures(toolkit):
        listed = listed_words()
        whose = f"TORCH_CUDA_ARCH_LIST is {listed!r}" if listed else "of the GPUs that are here"
        return f"{whose}: none has compute capability 8.0 or newer"
    return None


def listed_words() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")


def architectures(toolkit: Path) -> list[str]:
    """ "8.0", "9.0", "12.0+PTX": TORCH_CUDA_ARCH_LIST, else the GPUs', else the common ones."""
    if listed := listed_words():
        return listed_architectures(listed)
    if present := present_architectures():
        return listed_architectures(" ".join(present))
    newest = ["10.0", "12.0"] if toolkit_version(toolkit) >= (12, 8) else []
    common = ["8.0", "9.0", *newest]
    return [*common[:-1], f"{common[-1]}+PTX"]


def present_architectures() -> list[str]:
    """Of the GPUs that are here; none without torch, as in some builds."""
    try:
        import torch
    except ImportError:
        return []
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [f"{major}.{minor}" for major, minor in sorted(set(found))]


def listed_architectures(listed: str) -> list[str]:
    """Those of a TORCH_CUDA_ARCH_LIST that have kernels; the others are left out."""
    words = re.split(r"[\s;,]+", listed)
    numbers = [number for word in words for number in NAMED_ARCHS.get(word, word).split()]
    if "native" in numbers:
        numbers = [number for number in numbers if number != "native"] + present_architectures()
    kept = []
    for number in numbers:
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", number)
        if found is None:
            raise SystemExit(
                f"pykvcache: TORCH_CUDA_ARCH_LIST has {number!r}; it takes numbers like 8.0, 9.0a "
                f"and 12.0+PTX, native, {', '.join(NAMED_ARCHS)}"
            )
        if (int(found[1]), int(found[2])) >= SMALLEST_ARCH:
            kept.append(number)
    return kept


def gencode_flags(archs: list[str]) -> str:
    """nvcc's -gencode options. 9.0 is always 9.0a, for wgmma; PTX is that of any later GPU."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if arch.endswith("+PTX"):
            any_later = number.rstrip("af")
            flags.append(f"-gencode=arch=compute_{any_later},code=compute_{any_later}")
    return " ".join(dict.fromkeys(flags))


def nvcc_flags(torch_dir: Path) -> str:
    """Everything but -gencode. USE_CUDA opens the part of the stable ABI that has streams."""
    return (
        f"-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC -DNDEBUG -DUSE_CUDA "
        f"-DTORCH_TARGET_VERSION=0x020a000000000000 -I{shlex.quote(str(ROOT / 'csrc'))} "
        f"-isystem {shlex.quote(str(torch_dir / 'include'))}"
    )


def sources() -> list[tuple[Path, str, str]]:
    """(source, object name, extra flags) of `_C_cuda`; attention kernels once per class of dims."""
    folder = ROOT / "csrc" / "cuda"
    errors = ROOT / "csrc" / "python" / "errors.cpp"
    found = [(folder / "module.cpp", "module", ""), (errors, "errors", "")]
    for source in sorted(folder.glob("*.cu")):
        if source.stem in ("decode_kernels", "prefill_kernels", "wgmma_kernels"):
            for dim in HEAD_DIMS:
                found.append((source, f"{source.stem}_{dim}", f"-DKV_HEAD_DIM={dim}"))
        else:
            found.append((source, source.stem, ""))
    return found
