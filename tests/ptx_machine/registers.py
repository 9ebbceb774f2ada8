"""The registers of a CTA: one numpy array [threads] each, seen as any type of its width."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault
from ptx_machine.parse import SIZES, Operand, Program

Array = NDArray[Any]
TYPES: dict[str, type] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16,
    "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xA5  # in every byte of a register before it is written
# Where shared memory begins for generic addresses.
SHARED_WINDOW = 0x7F00_0000_0000


class Registers:
    """Arrays by name; operands of instructions are bound to them once."""

    def __init__(self, program: Program, threads: int) -> None:
        self.program, self.threads = program, threads
        self._files: dict[str, Array] = {}  # by prefix: [count, threads]
        self._single: dict[str, Array] = {}
        for name, kind in program.registers.items():
            dtype = np.bool_ if kind == "pred" else BITS[SIZES[kind]]
            if counted := re.fullmatch(r"(.*)<(\d+)>", name):
                self._files[counted[1]] = np.zeros((int(counted[2]), threads), dtype)
            else:
                self._single[name] = np.zeros(threads, dtype)
        self.special = _special(threads)
        self.symbols: dict[str, int] = {}
        self._constants: dict[tuple[str, type], Array] = {}

    def poison(self) -> None:
        """Before a CTA starts: what it does not write is garbage, and not of the CTA before it."""
        for array in (*self._files.values(), *self._single.values()):
            array.view(np.uint8)[...] = 1 if array.dtype == np.bool_ else POISON

    def array(self, name: str) -> Array:
        """The bits of a register."""
        if name in self._single:
            return self._single[name]
        prefix = re.sub(r"\d+$", "", name)
        if prefix not in self._files:
            raise Fault(f"no register {name}")
        array: Array = self._files[prefix][int(name[len(prefix) :])]
        return array

    def read(self, operand: Operand, kind: str) -> Array:
        """[threads] of the operand as type `kind`, which has the width of its register."""
        dtype = TYPES[kind]
        if operand.kind == "register":
            array = self.array(operand.text)
            if array.dtype.itemsize != np.dtype(dtype).itemsize:
                raise Fault(f"{operand.text} has another width than {kind}")
            return array if array.dtype == np.bool_ else array.view(dtype)
        if operand.kind == "name" and operand.text in self.special:
            return self.special[operand.text].view(TYPES[kind])
        return self.constant(operand, dtype)

    def constant(self, operand: Operand, dtype: type) -> Array:
        key = (operand.text, dtype)
        if key not in self._constants:
            if operand.kind == "name":
                if operand.text not in self.symbols:
                    raise Fault(f"name {operand.text} is not known")
                bits = self.symbols[operand.text]
            else:
                bits = number_bits(operand.text, dtype)
            self._constants[key] = np.full(self.threads, from_bits(bits, dtype))
            self._constants[key].flags.writeable = False
        return self._constants[key]

    def write(self, operand: Operand, kind: str) -> Array:
        """The array to write a result of type `kind` to."""
        if operand.kind == "sink":
            return np.empty(self.threads, TYPES[kind])
        return self.read(operand, kind)

    def width(self, operand: Operand) -> int:
        """Bytes of a register; 0 for a number, which has any."""
        return self.array(operand.text).dtype.itemsize if operand.kind == "register" else 0


def number_bits(text: str, dtype: type) -> int:
    """Of an immediate: 0f3F800000, 0d..., 12, -1, 0xFF, 1.5."""
    if text[:2] in ("0f", "0F"):
        return int(text[2:], 16)
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    if "." in text:
        form = {np.float32: "<f", np.float64: "<d"}[dtype]
        return int.from_bytes(struct.pack(form, float(text)), "little")
    value = int(text.rstrip("U"), 0)
    return int(value != 0) if dtype == np.bool_ else value


def from_bits(bits: int, dtype: type) -> Any:
    if dtype == np.bool_:
        return np.bool_(bits)
    size = np.dtype(dtype).itemsize
    return np.array(bits & ((1 << 8 * size) - 1), BITS[size]).view(dtype)[()]


def _special(threads: int) -> dict[str, Array]:
    """tid and lane are fixed; the machine sets the others for each launch and CTA."""
    thread = np.arange(threads, dtype=np.uint32)
    names = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
    special = {name: np.zeros(threads, np.uint32) for name in names}
    special["%tid.x"] = thread
    special["%laneid"], special["%warpid"] = thread % 32, thread // 32
    for name in ("%dynamic_smem_size", "%smid", "%clock"):
        special[name] = np.zeros(threads, np.uint32)
    special["%lanemask_lt"] = ((np.uint32(1) << thread % 32) - np.uint32(1)).astype(np.uint32)
    return special
