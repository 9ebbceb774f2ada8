"""What a user meets before any tensor: imports, missing parts, the package's contents."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh process in the repository root, as a user's shell would run it."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_is_not_fooled_by_our_kernels_folder() -> None:
    """Hugging Face owns the import name `kernels`: code of ours under it would break transformers.

    Without an `__init__.py` the folder is at most an empty namespace: any real package of that name
    precedes it, and it has no file to run.
    """
    out = run_python(
        """
import importlib.metadata, sys, torch, transformers
config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, vocab_size=64, pad_token_id=0)
model = transformers.LlamaForCausalLM(config)
model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)
import pykvcache
pykvcache.patch(model)
model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)
installed = {name.lower() for name in importlib.metadata.packages_distributions()}
available = transformers.utils.is_kernels_available()
print(getattr(sys.modules.get("kernels"), "__file__", None), available <= ("kernels" in installed))
"""
    )
    file, not_fooled = out.split()
    assert not file.startswith(str(ROOT))
    assert not_fooled == "True"


@pytest.mark.parametrize("module", ["pykvcache", "pykvcache.ops", "pykvcache.attention"])
def test_import_is_light(module: str) -> None:
    out = run_python(f"import sys, {module}; print(*sys.modules)")
    heavy = {"transformers", "pykvcache.kernels.launch", "matplotlib", "typer", "rich"}
    assert not heavy & set(out.split())


def test_reference_works_without_the_extension() -> None:
    out = run_python(
        """
import sys, warnings
sys.modules["pykvcache._C"] = None
import torch
from pykvcache import ops
print(ops.backends()["cpu"])
cache = torch.zeros(2, 1, 4, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.write_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), cache, cache.clone(), torch.tensor([5]))
print(len(caught), cache.sum().item())
try:
    ops.merge_states(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1), backend="cpu")
except RuntimeError as error:
    print(error)
"""
    )
    reason, used, error = out.splitlines()
    assert "pip install" in reason
    assert used == "1 8.0"
    assert error.startswith("backend 'cpu' is not available: not built or not loadable")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_set_can_be_lowered(isa: str) -> None:
    code = "import torch; from pykvcache import _C; print(_C.cpu_isa())"
    best = run_python(code).strip()
    order = ["portable", "avx2", "avx512", "avx512bf16"]
    wanted = min(isa, best, key=order.index)
    assert run_python(code, PYKVCACHE_CPU_ISA=isa).strip() == wanted


def test_setup_lists_every_package_and_the_traces() -> None:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    folders = {file.parent for file in (ROOT / "pykvcache").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    names |= {
        f"pykvcache.kernels.{f.parent.name}" for f in (ROOT / "kernels").glob("*/__init__.py")
    }
    assert set(arguments["packages"]) == names
    for package, folder in arguments["package_dir"].items():
        assert (ROOT / folder).is_dir(), package
    shipped = [
        file
        for pattern in arguments["package_data"]["pykvcache.bench"]
        for file in (ROOT / "pykvcache/bench").glob(pattern)
    ]
    present = [file for file in (ROOT / "pykvcache/bench/traces").rglob("*") if file.is_file()]
    assert set(present) <= set(shipped)


def test_setup_names_a_setuptools_that_is_too_old() -> None:
    """Older ones reject the licence expression of pyproject.toml with a page of text."""
    with (
        mock.patch("setuptools.__version__", "65.5.0"),
        mock.patch("setuptools.setup") as setup,
        pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 .* 'setuptools>=77'"),
    ):
        runpy.run_path(str(ROOT / "setup.py"))
    assert not setup.called


def test_no_importable_package_named_kernels() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "kernels/triton").exists()


def test_no_file_names_a_folder_of_one_machine() -> None:
    """Paths of somebody's machine have no meaning elsewhere."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the list of tracked files")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    private = re.compile(r"(?<![\w.$}/])/(?:home|root|work|tmp|Users)/\w")
    for name in listed.stdout.split("\0"):
        if not name or "/traces/" in name or not (ROOT / name).exists():
            continue
        found = private.search((ROOT / name).read_text(errors="replace"))
        assert found is None, f"{name}: {found.group()}"
