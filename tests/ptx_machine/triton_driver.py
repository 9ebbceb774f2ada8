"""Triton kernels on the machine: a driver for a device that is played by it.

Inside `playing(arch)` backend "triton" takes CPU tensors. The launchers, Triton's specialisation
and its compiler run as on a GPU of that architecture, down to PTX, which the machine executes.

Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from ptx_machine.fault import Fault
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from pykvcache.kernels.launch import attention, operators
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton_launches import TARGETS, Absent

from pykvcache import operators as tables

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
INTEGERS = {"i1": np.uint8, "i8": np.int8, "u8": np.uint8, "i16": np.int16, "i32": np.int32,
            "u32": np.uint32, "i64": np.int64, "u64": np.uint64}  # fmt: skip
FLOATS = {"fp32": np.float32, "f32": np.float32}


@dataclass
class Settings:
    """What a test may change while the driver plays."""

    programs: int = 3  # of decode, for each group
    seed: int | None = None  # of the order of CTAs; None: ascending
    change: Callable[[str, str], str] = lambda name, ptx: ptx  # of the PTX of a kernel
    launches: list[str] = field(default_factory=list)  # names of kernels, in order


class Launcher:
    """What Triton calls with a grid and the arguments of the launcher."""

    def __init__(self, settings: Settings, source: Any, metadata: Any) -> None:
        self.settings = settings
        names, types = source.fn.arg_names, source.signature
        self.taken = [(i, n, types[n]) for i, n in enumerate(names) if types[n] != "constexpr"]
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Fault("a kernel wants scratch memory, which this machine does not have")

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        if min(x, y, z) < 1 or x >= 2**31 or max(y, z) > 65535:
            raise ValueError(f"grid {(x, y, z)} cannot be launched")
        machine = machine_for(ptx, self.threads, self.shared)
        memory, values = machine.new_memory(), rest[4:]  # after metadata and hooks
        arguments = [argument_bits(memory, values[i], n, kind) for i, n, kind in self.taken]
        self.settings.launches.append(machine.program.name)
        seed = self.settings.seed
        order = None if seed is None else np.random.default_rng(seed)
        machine.launch((x, y, z), [*arguments, 0, 0], order)


@functools.lru_cache(maxsize=64)
def machine_for(ptx: str, threads: int, shared: int) -> Machine:
    return Machine(parse(ptx), threads, shared)


def argument_bits(memory: Any, value: Any, name: str, kind: str) -> int:
    """What the parameter holds; a number that does not fit its type is an error, as in a launch."""
    if kind[0] == "*":
        return int(memory.register(value, name)) if isinstance(value, Tensor) else 0
    if kind in FLOATS:
        return int(np.array(value, np.float32).view(np.uint32))
    dtype = np.dtype(INTEGERS[kind])
    limits = np.iinfo(dtype)
    if not limits.min <= int(value) <= limits.max:
        raise OverflowError(f"{name} is {value}, which is no {kind}")
    return int(np.array(int(value), dtype).view(f"u{dtype.itemsize}"))


class Utils:
    """The part of Triton's driver that loads modules; what is loaded is PTX."""

    def __init__(self, arch: str, settings: Settings) -> None:
        self.arch, self.settings = arch, settings

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.arch]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        ptx = self.settings.change(name, binary.decode())
        return None, ptx, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


_numbers = itertools.count(1000)


class Played(Absent):
    """The device."""

    def __init__(self, arch: str, settings: Settings) -> None:
        super().__init__(arch)
        self.number = next(_numbers)  # Triton keeps loaded kernels by device
        self.utils = Utils(arch, settings)
        self.launcher_cls = functools.partial(Launcher, settings)


_library: list[torch.library.Library] = []


def _register() -> str:
    """Operators of backend "triton" for CPU tensors, once a process."""
    if not _library:
        library = torch.library.Library("pykvcache_triton", "IMPL")
        _library.append(library)
        for name in tables.SCHEMAS:
            library.impl(name, getattr(operators, name), "CPU")
    return "ready"


@contextmanager
def playing(arch: str, **options: Any) -> Iterator[Settings]:
    """Backend "triton" as on a GPU of `arch`; `options` are of Settings."""
    settings, driver = Settings(**options), triton.runtime.driver
    before, folder = driver._active, triton.knobs.cache.dir

    def as_binary(self: Any, ptx: str, *_: Any) -> bytes:
        return ptx.encode()

    with ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(CUDABackend, "make_cubin", as_binary)
        patch(attention, "architecture", lambda device: arch)
        patch(attention, "decode_programs", lambda *_: settings.programs)
        triton.knobs.cache.dir = _cache_folder()  # what is cached there is no machine code
        driver.set_active(Played(arch, settings))
        try:
            yield settings
        finally:
            driver._active, triton.knobs.cache.dir = before, folder


@functools.cache
def _cache_folder() -> str:
    """Kept while the process lives, or where PYKVCACHE_PTX_CACHE says."""
    kept = os.environ.get("PYKVCACHE_PTX_CACHE")
    if kept:
        return kept
    folder = tempfile.TemporaryDirectory()
    _folders.append(folder)
    return folder.name


_folders: list[tempfile.TemporaryDirectory[str]] = []


def load() -> None:
    """Let backend "triton" be ready in this process."""
    tables.LOADERS["triton"] = _register


assert set(TARGETS) >= set(SHARED_BYTES)
