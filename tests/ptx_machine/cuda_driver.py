"""Backend "cuda" without a GPU: the kernels as nvcc compiles them, on the machine of this folder.

Operators and launchers are those of the emulation (tests/cuda_host), built so that it hands over
every launch; the kernel is looked up in nvcc's PTX. A process has either this or the emulation.
Needs nvcc.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from cuda_host import build
from cuda_resources import find_nvcc
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pykvcache import operators

DEFINES = "-DKV_HOST_PTX"
LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t,
    ctypes.c_void_p, ctypes.c_size_t,
)  # fmt: skip
KERNEL = re.compile(r"(\w+_kernel(?:<.*>)?)\(")
PER_DIM = ("decode_kernel", "prefill_kernel", "wgmma_kernel")
HEAP_ALIGNMENT = 16


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


@functools.cache
def kernel_places() -> dict[int, tuple[str, int]]:
    """Offset of each kernel in the emulation -> its name and class of head dims, 0 for any."""
    names = subprocess.run(
        ["nm", str(build.extension(DEFINES))], capture_output=True, text=True, check=True
    ).stdout
    places: dict[str, list[int]] = {}
    for line in demangled(names).splitlines():
        address, kind, name = line.split(" ", 2)
        if kind in "tT" and (found := KERNEL.search(name)) and "::with_kernel" not in name:
            places.setdefault(found[1], []).append(int(address, 16))
    result = {}
    for name, offsets in places.items():
        # A ring of two stages is made for the largest class alone.
        dims = build.HEAD_DIMS[-1:] if name.endswith(", 2>") else build.HEAD_DIMS
        dims = dims if name.startswith(PER_DIM) else (0,)
        assert len(offsets) == len(dims), (name, offsets)
        for offset, dim in zip(sorted(offsets), dims, strict=True):  # in the order of linking
            result[offset] = name, dim
    return result


def base_address() -> int:
    """Where the emulation was loaded."""
    name = "kv_emulation_set_launcher"
    names = subprocess.run(
        ["nm", "-D", str(build.extension(DEFINES))], capture_output=True, text=True, check=True
    ).stdout
    offset = int(re.findall(rf"(\w+) T {name}\n", names)[0], 16)
    address = ctypes.cast(getattr(build.control(DEFINES), name), ctypes.c_void_p).value
    assert address is not None
    return address - offset


@functools.cache
def module(arch: str, source: str, extra: str) -> tuple[str, dict[str, str]]:
    """nvcc's PTX of a source, and the names of its kernels by the names that people use."""
    found = find_nvcc()
    assert found is not None
    nvcc, flags = found
    folder = build.FOLDER / build.digest("ptx", nvcc, *flags, arch, source, extra)
    target = folder / "kernels.ptx"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"kernels.{id(target)}.ptx"
        command = [nvcc, "-ptx", "-lineinfo", f"-arch={arch}", *flags, *extra.split()]
        build.run([*command, str(build.ROOT / source), "-o", str(new)])
        new.rename(target)
    text = target.read_text()
    entries = re.findall(r"\.entry\s+([\w$]+)", text)
    readable = demangled("\n".join(entries)).splitlines()
    names = {}
    for entry, name in zip(entries, readable, strict=True):
        kernel = KERNEL.search(name)
        assert kernel is not None, name
        names[kernel[1]] = entry
    return text, names


def kernel_text(arch: str, name: str, dim: int) -> tuple[str, str]:
    """A module of PTX and what the kernel is called there."""
    for source, extra in build.kernel_sources((dim,) if dim else ()):
        if source.endswith(f"/{name.split('_')[0]}_kernels.cu") or not dim:
            text, names = module(arch, source, extra)
            if name in names:
                return text, names[name]
    raise LookupError(f"no kernel {name} for head dims up to {dim}")


def load() -> None:
    """Backend "cuda" is ready, on CPU tensors; its operators need `playing`."""
    operators.LOADERS["cuda"] = lambda: build.load(DEFINES)


class Launches(TorchDispatchMode):
    """While it is entered, what the launchers of backend "cuda" launch is run on the machine.

    Args:
        arch: "sm_80", ...
        seed: shuffles the CTAs of every launch; None: in order.

    Attributes:
        kernels: names of those that ran, with template arguments.
        change: edits the PTX of a kernel, given its name and module.
    """

    machines: ClassVar[dict[tuple[Any, ...], Machine]] = {}

    def __init__(self, arch: str, seed: int | None = None) -> None:
        super().__init__()
        self.arch, self.seed = arch, seed
        self.kernels: list[str] = []
        self.change: Callable[[str, str], str] | None = None
        self._tensors: list[Tensor] = []
        self._error: Exception | None = None
        self._base = base_address()
        self._callback = LAUNCHER(self._launched)
        self._usable = ctypes.CDLL(None).malloc_usable_size
        self._usable.restype, self._usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        build.control(DEFINES).kv_emulation_set_launcher(self._callback)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the tensors of an operator of the backend, and raise what its kernels do wrong."""
        kwargs = kwargs or {}
        if func.namespace != "pykvcache_cuda":
            return func(*args, **kwargs)
        self._tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._error = None
        result = func(*args, **kwargs)
        if self._error is not None:
            raise self._error
        return result

    def _launched(
        self, kernel: int, grid: Any, threads: int, shared: int, params: int, size: int
    ) -> None:
        if self._error is not None:  # what would follow works on garbage
            return
        try:
            name, dim = kernel_places()[kernel - self._base]
            self.kernels.append(name)
            machine = self._machine(name, dim, threads, shared)
            declared = machine.program.parameters[0][2]
            assert declared == size, f"{name} takes {declared} bytes, the launcher gives {size}"
            words = bytearray(ctypes.string_at(params, size))
            self._move_pointers(machine, words)
            order = None if self.seed is None else np.random.default_rng(self.seed)
            machine.launch(grid[:3], [int.from_bytes(words, "little")], order)
        except Exception as error:
            self._error = error

    def _machine(self, name: str, dim: int, threads: int, shared: int) -> Machine:
        if self.change is not None:
            text, entry = kernel_text(self.arch, name, dim)
            return Machine(parse(self.change(name, text), entry), threads, shared)
        key = self.arch, name, dim, threads, shared
        if key not in self.machines:
            program = parse(*kernel_text(self.arch, name, dim))
            self.machines[key] = Machine(program, threads, shared)
        return self.machines[key]

    def _move_pointers(self, machine: Machine, words: bytearray) -> None:
        """Register what the parameters point to, and let them point to its made-up addresses."""
        memory = machine.new_memory()
        regions = _writable_regions()
        for at in range(0, len(words) - 7, 8):
            pointer = int.from_bytes(words[at : at + 8], "little")
            address = self._address(memory, pointer, regions, at)
            if address:
                words[at : at + 8] = address.to_bytes(8, "little")

    def _address(self, memory: Any, pointer: int, regions: list[tuple[int, int]], at: int) -> int:
        found = 0
        for number, tensor in enumerate(self._tensors):
            storage = tensor.untyped_storage()
            if tensor.numel() and 0 <= pointer - storage.data_ptr() < storage.nbytes():
                address = memory.register(tensor, f"argument {number}")
                found = address + pointer - tensor.data_ptr()
        if found:
            return found
        end = next((end for begin, end in regions if begin < pointer < end), 0)
        if pointer % HEAP_ALIGNMENT or not end:
            return 0  # a number
        # Made by the launcher, a result or a workspace, if it is an allocation: glibc keeps the
        # size before it, with flags in the lowest bits.
        size = ctypes.c_uint64.from_address(pointer - 8).value & ~7
        if size % HEAP_ALIGNMENT or not 32 <= size <= end - pointer + HEAP_ALIGNMENT:
            return 0
        size = self._usable(pointer)
        if not size:
            return 0
        raw = (ctypes.c_uint8 * size).from_address(pointer)
        return memory.register(torch.frombuffer(raw, dtype=torch.uint8), f"workspace at {at}")


def playing(arch: str, seed: int | None = None) -> Launches:
    """Backend "cuda" as on a GPU of `arch`."""
    return Launches(arch, seed)


def _writable_regions() -> list[tuple[int, int]]:
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[1].startswith("rw"):
            begin, end = fields[0].split("-")
            regions.append((int(begin, 16), int(end, 16)))
    return regions
