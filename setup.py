"""Builds pykvcache: `_C` (CPU kernels and the block allocator) and `_C_cuda`, a ninja file each.

The extension uses LibTorch's stable ABI and Python's limited API, so a build serves every later
torch and Python. Kernel files are compiled once per instruction set, which is why the flags differ
by source; see native_sources(). Metadata lives in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not there under build isolation

import setup_cuda  # noqa: E402

OBJECTS = ROOT / "build" / "objects"  # kept for every kind of build, so that all are incremental
KERNEL_PACKAGES = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/__init__.py"))

AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISA_FLAGS = {
    "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vbmi",
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": "",
}


def find_torch() -> bool:
    """Make the torch of the environment that called pip importable, also under build isolation."""
    if importlib.util.find_spec("torch"):
        return True
    site_dirs = (
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
        site.getusersitepackages(),
    )
    for site_dir in site_dirs:
        if (Path(site_dir) / "torch" / "__init__.py").exists():
            sys.path.append(site_dir)  # appended: the isolated setuptools still wins
            return True
    return False


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def isa_variants() -> list[str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(ISA_FLAGS) if is_x86 else ["portable"]


def native_sources() -> list[tuple[Path, str, str]]:
    """(source, object name, extra flags) of `_C`; kernel files once per instruction set."""
    plain = [ROOT / "csrc/module.cpp"]
    for folder in ("python", "allocator", "cpu"):
        plain += sorted((ROOT / "csrc" / folder).glob("*.cpp"))
    sources = [(source, f"{source.parent.name}_{source.stem}", "") for source in plain]
    for kernel in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp")):
        for isa in isa_variants():
            sources.append((kernel, f"{kernel.stem}_{isa}", f"{ISA_FLAGS[isa]} -DKV_ISA={isa}"))
    return sources


def compile_flags() -> str:
    include = torch_dir() / "include"
    flags = [
        "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -DNDEBUG",
        "-Wall -Wextra",
        "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000",
        f"-I{shlex.quote(str(ROOT / 'csrc'))} -isystem {shlex.quote(str(include))}",
        f"-isystem {shlex.quote(sysconfig.get_path('include'))}",
        "-DKV_X86=1" if len(isa_variants()) > 1 else "",
        os.environ.get("CXXFLAGS", ""),
    ]
    return " ".join(flag for flag in flags if flag)


def link_flags() -> str:
    lib = shlex.quote(str(torch_dir() / "lib"))
    if sys.platform == "darwin":
        return f"-bundle -undefined dynamic_lookup -L{lib} -ltorch_cpu"
    return f"-shared -L{lib} -ltorch_cpu -Wl,--as-needed"


def cuda_link_flags(toolkit: Path) -> str:
    lib = shlex.quote(str(torch_dir() / "lib"))
    runtime = setup_cuda.runtime_link_flags(toolkit)
    return f"-shared -L{lib} -ltorch_cpu -ltorch_cuda {runtime}"


def ninja_variables(name: str) -> tuple[dict[str, str], list[tuple[Path, str, str]]]:
    """Variables of the ninja file of an extension, and its sources."""
    variables = {
        "cxx": os.environ.get("CXX", "c++"),
        "cflags": compile_flags(),
        "ldflags": f"{link_flags()} {os.environ.get('LDFLAGS', '')}",
    }
    if name != "pykvcache._C_cuda":
        return variables, native_sources()
    toolkit = setup_cuda.find_toolkit(setup_cuda.torch_cuda_version(torch_dir()))
    assert toolkit is not None  # setup_cuda.why_not() has seen it
    variables["ldflags"] = f"{cuda_link_flags(toolkit)} {os.environ.get('LDFLAGS', '')}"
    nvcc = shlex.quote(str(toolkit / "bin" / "nvcc"))
    variables["nvcc"] = f"{nvcc} {setup_cuda.host_compiler_flags(variables['cxx'])}"
    archs = setup_cuda.architectures(toolkit)
    gencode = setup_cuda.gencode_flags(archs)
    variables["nvccflags"] = f"{setup_cuda.nvcc_flags(torch_dir())} {gencode}"
    return variables, setup_cuda.sources()


def write_ninja(build_dir: Path, target: Path, name: str) -> None:
    variables, sources = ninja_variables(name)
    lines = [
        *(f"{variable} = {value}" for variable, value in variables.items()),
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule compile_cuda",
        "  command = $nvcc -MD -MF $out.d $nvccflags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = link $out",
    ]
    objects = []
    for source, stem, extra in sources:
        rule = "compile_cuda" if source.suffix == ".cu" else "compile"
        objects.append(f"{stem}.o")
        lines += [f"build {stem}.o: {rule} {ninja_path(source)}", f"  extra = {extra}"]
    lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", ""]
    (build_dir / "build.ninja").write_text("\n".join(lines))


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def max_jobs() -> int:
    """MAX_JOBS, else one job a core but no more than 2 GB of memory each allow."""
    if jobs := os.environ.get("MAX_JOBS"):
        return int(jobs)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // 2**31))


class NinjaBuild(build_ext):
    """Runs ninja on the file that write_ninja() makes: incremental, up to max_jobs() at once."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build_dir = OBJECTS / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        write_ninja(build_dir, target, ext.name)
        command = [*ninja_command(), "-C", str(build_dir), f"-j{max_jobs()}"]
        if subprocess.call(command) != 0:
            raise SystemExit("pykvcache: the C++ build failed; the compiler's message is above")


def ninja_command() -> list[str]:
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]


if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"pykvcache: setuptools {setuptools.__version__} cannot read pyproject.toml; "
        "run pip install 'setuptools>=77', or pip install . which fetches one for the build"
    )
has_torch = find_torch()
names = ["pykvcache._C"] if has_torch else []
if has_torch and (reason := setup_cuda.why_not(torch_dir())):
    print(f"pykvcache: the CUDA part is not built: {reason}")
elif has_torch:
    names.append("pykvcache._C_cuda")
setup(
    packages=[
        *find_packages(str(ROOT), include=("pykvcache", "pykvcache.*")),
        *(f"pykvcache.kernels.{name}" for name in KERNEL_PACKAGES),
    ],
    package_dir={f"pykvcache.kernels.{name}": f"kernels/{name}" for name in KERNEL_PACKAGES},
    package_data={
        "pykvcache": ["py.typed"],
        "pykvcache.bench": ["traces/*", "traces/LICENSES/*"],
        "pykvcache.bench.replay": ["configs.json"],
        "pykvcache.kernels.launch": ["table.json"],
    },
    ext_modules=[Extension(name, sources=[], py_limited_api=True) for name in names],
    setup_requires=[] if has_torch else ["torch>=2.10"],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
