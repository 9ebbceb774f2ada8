"""Shifts, bit fields, bytes and tables of bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.operands import Binders, Closure, put, reads
from ptx_machine.parse import Instruction

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()


@BINDERS.of("shl", "shr")
def _shift(machine: Machine, ins: Instruction) -> Closure:
    name, kind = ins.opcode[0], ins.opcode[-1]
    registers = machine.registers
    target = registers.write(ins.operands[0], kind)
    a, count = registers.read(ins.operands[1], kind), registers.read(ins.operands[2], "u32")
    width = int(kind[1:])
    function = np.left_shift if name == "shl" else np.right_shift
    most = np.uint32(width - 1)

    def run(mask: Any) -> None:
        value = function(a, np.minimum(count, most).astype(a.dtype))
        if name == "shl" or kind[0] != "s":  # more than all bits: 0; an arithmetic shift clamps
            value = np.where(count > most, a.dtype.type(0), value)
        put(target, value, mask)

    return run


@BINDERS.of("shf")
def _funnel(machine: Machine, ins: Instruction) -> Closure:
    _, side, mode, _ = ins.opcode
    target = machine.registers.write(ins.operands[0], "b32")
    low, high, count = reads(machine, ins, "b32")

    def run(mask: Any) -> None:
        n = count & np.uint32(31) if mode == "wrap" else np.minimum(count, np.uint32(32))
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n64 = n.astype(np.uint64)
        value = both >> n64 if side == "r" else (both << n64) >> np.uint64(32)
        put(target, value.astype(np.uint32), mask)

    return run


@BINDERS.of("bfe")
def _extract(machine: Machine, ins: Instruction) -> Closure:
    kind, registers = ins.opcode[-1], machine.registers
    target, a = registers.write(ins.operands[0], kind), registers.read(ins.operands[1], kind)
    begin, length = (registers.read(o, "u32") for o in ins.operands[2:])
    width = int(kind[1:])

    def run(mask: Any) -> None:
        first = (begin & np.uint32(255)).astype(np.int64)
        count = (length & np.uint32(255)).astype(np.int64)
        count = np.minimum(count, width - first)  # a field past the end: the sign, or 0
        unsigned = a.view(f"u{width // 8}").astype(np.uint64)
        shifted = np.where(first < 64, unsigned >> np.minimum(first, 63).astype(np.uint64), 0)
        keep = np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << np.clip(count, 0, 63).astype(
            np.uint64)) - np.uint64(1))  # fmt: skip
        value = shifted & keep
        if kind[0] == "s":
            top = np.minimum(first + np.maximum(count, 1) - 1, width - 1).astype(np.uint64)
            sign = (unsigned >> top) & np.uint64(1)
            value = np.where((sign == 1) & (length != 0), value | ~keep, value)
        put(target, value.astype(f"u{width // 8}").view(a.dtype), mask)

    return run


@BINDERS.of("bfi")
def _insert(machine: Machine, ins: Instruction) -> Closure:
    kind, registers = ins.opcode[-1], machine.registers
    target = registers.write(ins.operands[0], kind)
    a, b = (registers.read(o, kind) for o in ins.operands[1:3])
    begin, length = (registers.read(o, "u32") for o in ins.operands[3:])
    bits = int(kind[1:])

    def run(mask: Any) -> None:
        first = np.minimum(begin & np.uint32(255), np.uint32(63)).astype(np.uint64)
        count = np.minimum(length & np.uint32(255), np.uint32(bits)).astype(np.uint64)
        keep = np.where(
            count >= 64, ~np.uint64(0), (np.uint64(1) << (count & np.uint64(63))) - np.uint64(1)
        )
        field = keep << first
        value = (b.astype(np.uint64) & ~field) | ((a.astype(np.uint64) << first) & field)
        put(target, value.astype(b.dtype), mask)

    return run


@BINDERS.of("popc", "clz", "brev", "bfind")
def _count(machine: Machine, ins: Instruction) -> Closure:
    name, kind = ins.opcode[0], ins.opcode[-1]
    target = machine.registers.write(ins.operands[0], kind if name == "brev" else "u32")
    (a,) = reads(machine, ins, kind)
    width = int(kind[1:])

    def one(x: int) -> int:
        if name == "popc":
            return x.bit_count()
        if name == "brev":
            return int(f"{x:0{width}b}"[::-1], 2)
        return width - x.bit_length() if name == "clz" else (x.bit_length() - 1) & 0xFFFFFFFF

    def run(mask: Any) -> None:
        values = [one(int(x)) for x in a.view(f"u{width // 8}")]
        put(target, np.array(values, target.dtype), mask)

    return run


@BINDERS.of("prmt")
def _permute_bytes(machine: Machine, ins: Instruction) -> Closure:
    """Each nibble of the selector takes one of the 8 bytes of {b, a}, or its sign 8 times."""
    if len(ins.opcode) != 2:
        raise ValueError("a mode of prmt is not known")
    target = machine.registers.write(ins.operands[0], "b32")
    a, b, selector = reads(machine, ins, "b32")
    lanes = np.arange(machine.threads)[:, None]

    def run(mask: Any) -> None:
        both = np.stack([a, b], 1).view(np.uint8)
        nibble = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        chosen = both[lanes, nibble & 7]
        signs = np.where(chosen & 0x80, np.uint8(255), np.uint8(0))
        chosen = np.where(nibble & 8, signs, chosen).astype(np.uint8)
        put(target, np.ascontiguousarray(chosen).view(np.uint32)[:, 0], mask)

    return run


@BINDERS.of("lop3")
def _three_inputs(machine: Machine, ins: Instruction) -> Closure:
    if ins.opcode[1] != "b32" or len(ins.operands) != 5:
        raise ValueError("a form of lop3 is not known")
    target = machine.registers.write(ins.operands[0], "b32")
    a, b, c = (machine.registers.read(o, "b32") for o in ins.operands[1:4])
    table = int(ins.operands[4].text.rstrip("U"), 0)

    def run(mask: Any) -> None:
        value = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                value |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        put(target, value, mask)

    return run
