"""For all tests: seeds, running a command, GPU backends without a GPU, tensors moved to a GPU."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

os.environ["PYKVCACHE_LAUNCH_TABLE"] = "none"  # what was tuned on this machine is no part of tests

from choose_gpu import SIMULATED
from cuda_host import build
from gpu_backends import GPU_BACKENDS

from pykvcache import cli, operators, ops

if SIMULATED:
    operators.LOADERS.update(dict.fromkeys(GPU_BACKENDS, lambda: "ready"))
elif not torch.cuda.is_available():
    operators.LOADERS["cuda"] = build.load  # the CUDA kernels as host C++, on CPU tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that the last minutes do not belong to one worker alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _move_to_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU: operators of its backends work on moved copies of CPU tensors.

    What they write is copied back, so a test that names a backend runs on any of them.
    """
    if torch.cuda.is_available():
        for name in operators.SCHEMAS:
            monkeypatch.setattr(ops, name, moving(getattr(ops, name), "cuda"))


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `pykvcache ...` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pykvcache", *arguments])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def moving(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` of pykvcache.ops with its CPU tensors moved to `device` and back."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") not in GPU_BACKENDS:
            return function(*args, **kwargs)
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def there(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.device.type != "cpu":
                return x
            return moved.setdefault(id(x), (x, copy_with_strides(x, device)))[1]

        result = function(*tree_map(there, args), **tree_map(there, kwargs))
        for original, copy in moved.values():
            original.copy_(copy)
        return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, result)

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def copy_with_strides(x: Tensor, device: str) -> Tensor:
    """A copy of x on a device; `Tensor.to` may make it contiguous."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return copy.copy_(x)
