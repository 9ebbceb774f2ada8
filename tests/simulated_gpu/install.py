"""Puts the simulated GPU into this process.

Read first: device.py, cuda_api.py.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

from simulated_gpu.cuda_api import FAKES
from simulated_gpu.device import Methods, Operators

_entered = ExitStack()


def install(guard: Path) -> None:
    """From here on torch has a device "cuda:0".

    Args:
        guard: where to put the compiled device guard; used as it is if it is there.

    Raises:
        RuntimeError: torch is a CUDA build, whose own device guard would ask for a driver.
    """
    if torch.version.cuda is not None:
        raise RuntimeError("the simulated GPU needs a torch that is built without CUDA")
    _load_guard(guard)
    _set(torch.version, "cuda", "13.0")
    for name, value in FAKES.items():
        _set(torch.cuda, name, value)
    _set(threading.Thread, "run", _with_modes(threading.Thread.run))
    _set(nn.Module, "_apply", _apply_new(nn.Module._apply))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _entered.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
    for mode in (Operators(), Methods()):
        _entered.enter_context(mode)


def remove() -> None:
    """Take it out again."""
    _entered.close()


def _set(owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    _entered.callback(setattr, owner, name, old)
    setattr(owner, name, value)


def _load_guard(library: Path) -> None:
    """torch without CUDA cannot index a tensor on a GPU unless it knows a guard for the device."""
    if not library.exists():
        source = Path(__file__).parent / "guard.cpp"
        includes = [f"-I{path}" for path in include_paths()]
        links = [f"-L{path}" for path in library_paths()] + ["-lc10"]
        command = [get_cxx_compiler(), "-std=c++20", "-shared", "-fPIC", *includes, str(source)]
        subprocess.run([*command, "-o", str(library), *links], check=True)
    ctypes.CDLL(str(library))


def _with_modes(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Modes belong to a thread: others enter them, too."""

    def run_inside(self: threading.Thread) -> None:
        with Operators(), Methods():
            run(self)

    return run_inside


def _apply_new(apply: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Parameters that modules shared before `model.to(...)` are shared afterwards."""

    def apply_and_tie(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        if not recurse or getattr(_busy, "inside", False):
            return apply(self, function, recurse)
        _busy.inside = True
        try:
            owners: dict[int, list[tuple[nn.Module, str]]] = {}
            for module in self.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        owners.setdefault(id(parameter), []).append((module, name))
            result = apply(self, function, recurse)
            for first, *others in owners.values():
                for module, name in others:
                    module._parameters[name] = first[0]._parameters[first[1]]
            return result
        finally:
            _busy.inside = False

    return apply_and_tie


_busy = threading.local()
