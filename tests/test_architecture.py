"""Who may import whom: DESIGN of the layers, checked on the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {
        *("reference", "checks", "errors", "fakes", "launch_table", "pool_stats", "sizes"),
        *("block_layout", "storage", "weights", "_C", "_C_cuda", "kernels"),
    },
    {"allocator", "batch", "layer_step", "metadata", "operators", "ops"},
    {"cache", "plot"},
    {"attention"},
    {"hf"},
    {"engine"},
    {""},  # pykvcache/__init__.py: the names that users import
    {"bench"},
    {"cli", "__main__"},
)
SEPARATE = (
    {"allocator", "ops"},
    {"batch", "ops"},
    {"layer_step", "ops"},
)
PYTHON_FILES = sorted((ROOT / "pykvcache").rglob("*.py"))
TORCH_FREE = [
    *(ROOT / "csrc" / name for name in ("params.h", "cpu/launch.h", "cpu/layer_step.h")),
    *sorted((ROOT / "csrc/cpu/kernels").glob("*")),
    *sorted((ROOT / "csrc/cuda").glob("*.cuh")),
    *sorted((ROOT / "csrc/cuda").glob("*_kernels.cu")),
    *(file for file in sorted((ROOT / "csrc/allocator").glob("*")) if "binding" not in file.stem),
]


def part(module: str) -> str:
    """pykvcache.hf.cache -> hf; the package itself -> ""."""
    return [*module.split("."), ""][1]


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imported_parts(file: Path) -> set[str]:
    """Parts of pykvcache that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pykvcache":
            modules = {alias.name for alias in node.names if is_module(alias.name)}
            found |= {f"pykvcache.{name}" for name in modules}
            if len(modules) < len(node.names):
                found.add("pykvcache")
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return {part(name) for name in found if name.split(".")[0] == "pykvcache"}


def is_module(name: str) -> bool:
    package = ROOT / "pykvcache"
    return any((package / f"{name}{end}").exists() for end in (".py", ".pyi", "/__init__.py"))


@pytest.mark.parametrize("file", PYTHON_FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    relative = file.relative_to(ROOT / "pykvcache").with_suffix("")
    importer = "" if file.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0]
    for imported in imported_parts(file) - {importer}:
        if importer == "":
            assert imported not in ("cli", "bench"), f"the package must not need {imported}"
            continue
        assert layer(imported) <= layer(importer), f"{importer} must not import {imported}"
        assert {importer, imported} not in SEPARATE, f"{importer} and {imported} must stay apart"


def test_extension_is_never_imported_at_module_level() -> None:
    for file in PYTHON_FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert not (node.module or "").startswith("pykvcache._C"), file
                assert not (node.module == "pykvcache" and names & {"_C", "_C_cuda"}), file


def included(file: Path) -> set[str]:
    """Everything that a C++ file includes, followed through our own headers."""
    found: set[str] = set()
    pending = [file]
    while pending:
        text = pending.pop().read_text()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            if name not in found:
                found.add(name)
                ours = ROOT / "csrc" / name
                pending += [ours] if ours.exists() else []
    return found


@pytest.mark.parametrize("file", TORCH_FREE, ids=lambda f: str(f.relative_to(ROOT)))
def test_kernels_and_allocator_see_no_torch_and_no_python(file: Path) -> None:
    names = included(file)
    assert not [name for name in names if name.startswith(("torch/", "ATen/", "c10/"))]
    assert "Python.h" not in names
