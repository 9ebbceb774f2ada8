"""cvt: between integers, and floats of 8, 16, 32 and 64 bits. To nearest even unless it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.operands import Binders, Closure, from_bf16, halves, joined, put, to_bf16
from ptx_machine.parse import SIZES, Instruction
from ptx_machine.registers import BITS, TYPES

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
MODES = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "ftz", "sat", "satfinite")
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
LARGEST_E4M3 = 448.0


def _e4m3_values() -> Array:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    value = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    value = np.where(code & 127 == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


E4M3 = _e4m3_values()


def to_e4m3(x: Array) -> Array:
    """float32 to uint8, to nearest even, saturating at 448; NaN is 0x7F."""
    size = np.minimum(np.abs(x).astype(np.float64), LARGEST_E4M3)
    exponent = np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    rounded = np.rint(size / step) * step
    code = np.searchsorted(E4M3[:127].astype(np.float64), rounded).astype(np.uint8)
    code = np.where(np.signbit(x), code | 128, code)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


@BINDERS.of("cvt")
def _convert(machine: Machine, ins: Instruction) -> Closure:
    flags = [part for part in ins.opcode[1:] if part in MODES]
    kinds = [part for part in ins.opcode[1:] if part not in MODES]
    to, of = kinds
    if "x2" in to or "x2" in of:
        return _convert_pair(machine, ins, to, of, flags)
    registers = machine.registers
    target = registers.array(ins.operands[0].text)
    source = ins.operands[1]
    if source.kind == "register":
        given = registers.array(source.text)
    else:
        given = registers.read(source, of)
    width = target.dtype.itemsize

    def run(mask: Any) -> None:
        value = _decoded(given, of)
        bits = _encoded(value, to, flags)
        if bits.dtype.itemsize != width:
            signed = np.issubdtype(bits.dtype, np.signedinteger)
            bits = bits.astype(f"i{width}" if signed else f"u{width}")
        put(target, bits.view(target.dtype), mask)

    return run


def _decoded(bits: Array, kind: str) -> Array:
    """The low bits of a register as numbers; bfloat16 as float32."""
    size = 2 if kind == "bf16" else SIZES["b32" if kind == "tf32" else kind]
    low = bits if bits.dtype.itemsize == size else bits.astype(BITS[size])
    return from_bf16(low.view(np.uint16)) if kind == "bf16" else low.view(TYPES[kind])


def _encoded(value: Array, kind: str, flags: list[str]) -> Array:
    floats = np.issubdtype(value.dtype, np.floating)
    if kind == "bf16":
        return to_bf16(value.astype(np.float32))
    if kind == "tf32":
        bits = value.view(np.uint32)  # to nearest, ties away from zero
        return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    dtype = TYPES[kind]
    if kind[0] == "f":
        for flag in flags:
            value = ROUND[flag](value) if flag in ROUND else value
        if "sat" in flags:
            value = np.fmin(np.fmax(value, 0), 1)
        if "rz" in flags or "rm" in flags or "rp" in flags:
            raise ValueError("this rounding is not known")
        return value.astype(dtype)
    if floats:  # to integers: saturates, NaN is 0
        mode = next(flag for flag in flags if flag in ROUND)
        limits = np.iinfo(dtype)
        rounded = ROUND[mode](value.astype(np.float64))
        inside = np.clip(rounded, float(limits.min), float(limits.max))
        top = rounded >= float(limits.max)
        whole = np.where(top | np.isnan(rounded), 0, inside).astype(dtype)
        return np.where(top, limits.max, whole).astype(dtype)
    if "sat" in flags:
        limits = np.iinfo(dtype)
        value = np.array([min(max(int(x), limits.min), limits.max) for x in value])
    return value.astype(dtype)


def _convert_pair(
    machine: Machine, ins: Instruction, to: str, of: str, flags: list[str]
) -> Closure:
    """Two at once: of two float32 the first goes to the upper half."""
    registers = machine.registers
    target = registers.array(ins.operands[0].text)
    if of == "f32":
        high, low = (registers.read(o, "f32") for o in ins.operands[1:3])
        relu = "relu" in ins.opcode
        if relu:
            raise ValueError("relu is not known")

        def from_floats(mask: Any) -> None:
            put(target, _pair(low, high, to), mask)

        return from_floats
    source = registers.array(ins.operands[1].text)

    def run(mask: Any) -> None:
        if of == "e4m3x2":
            low, high = E4M3[source & 0xFF], E4M3[(source >> np.uint16(8)) & 0xFF]
        elif of == "f16x2":
            low, high = (h.view(np.float16).astype(np.float32) for h in halves(source))
        else:
            low, high = (from_bf16(h) for h in halves(source))
        put(target, _pair(low, high, to), mask)

    return run


def _pair(low: Array, high: Array, to: str) -> Array:
    if to == "bf16x2":
        return joined(to_bf16(low), to_bf16(high))
    if to == "f16x2":
        return joined(*(x.astype(np.float16).view(np.uint16) for x in (low, high)))
    if to == "e4m3x2":
        return to_e4m3(low).astype(np.uint16) | (to_e4m3(high).astype(np.uint16) << np.uint16(8))
    raise ValueError(f"type {to} is not known")
