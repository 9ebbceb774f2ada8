"""Arithmetic and logic (PTX ISA, "Instruction Set"). Read next: bits.py, comparisons.py.

float32 is numpy's, which is IEEE's. fma is computed in float64 and rounded once more, so that a
result in a hundred million or so may be rounded twice. Approximations (ex2, div.full, rcp ...)
are computed exactly: a GPU may be off by an ulp or two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.operands import (
    Binders,
    Closure,
    flush,
    from_bf16,
    halves,
    joined,
    predicate,
    put,
    reads,
    to_bf16,
)
from ptx_machine.parse import Instruction
from ptx_machine.registers import TYPES

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")
PLAIN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": np.left_shift, "min": np.minimum,
    "max": np.maximum, "neg": np.negative, "abs": np.abs, "not": np.invert,
}  # fmt: skip
UNARY_FLOAT = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "sin": np.sin,
    "cos": np.cos, "tanh": np.tanh, "neg": np.negative, "abs": np.abs,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
}  # fmt: skip


def _fma(a: Array, b: Array, c: Array) -> Array:
    return a.astype(np.float64) * b + c


BINARY_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fma,
    "mad": _fma, "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip


def _extreme(name: str, flags: tuple[str, ...]) -> Any:
    """min and max leave a NaN out; with .NaN they give it. -0 is less than +0."""
    if "NaN" in flags:
        function = np.minimum if name == "min" else np.maximum
    else:
        function = np.fmin if name == "min" else np.fmax

    def extreme(a: Array, b: Array) -> Array:
        found = function(a, b)
        zeros = (found == 0) & (a == b)
        if zeros.any():
            return np.where(zeros, a + b if name == "max" else -(-a - b), found)
        return found  # type: ignore[no-any-return]

    return extreme


@BINDERS.of("add", "sub", "and", "or", "xor", "min", "max", "neg", "abs", "not", "copysign",
            "ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "fma")  # fmt: skip
def _elementwise(machine: Machine, ins: Instruction) -> Closure:
    name, kind = ins.opcode[0], ins.opcode[-1]
    if kind in FLOATS:
        return _float(machine, ins)
    if kind in ("s16x2", "u16x2"):
        return _integer_pair(machine, ins)
    target = machine.registers.write(ins.operands[0], kind)
    sources = reads(machine, ins, kind)
    if kind == "pred":
        return _logic(machine, ins)
    function = PLAIN[name]
    if len(sources) == 1:
        (a,) = sources
        return lambda mask: function(a, out=target, where=mask)
    a, b = sources
    return lambda mask: function(a, b, out=target, where=mask)


def _integer_pair(machine: Machine, ins: Instruction) -> Closure:
    """Two 16-bit integers a register: add, min and max of sm_90."""
    name, kind = ins.opcode[0], ins.opcode[-1].removesuffix("x2")
    if len(ins.opcode) != 2 or name not in ("add", "min", "max"):
        raise ValueError("this form for pairs of integers is not known")
    target = machine.registers.write(ins.operands[0], "b32")
    a, b = reads(machine, ins, "b32")

    def run(mask: Any) -> None:
        sides = zip(halves(a), halves(b), strict=True)
        found = [PLAIN[name](x.view(TYPES[kind]), y.view(TYPES[kind])) for x, y in sides]
        put(target, joined(*(side.view(np.uint16) for side in found)), mask)

    return run


def _logic(machine: Machine, ins: Instruction) -> Closure:
    name = ins.opcode[0]
    target = machine.registers.write(ins.operands[0], "pred")
    sources = [predicate(machine, o) for o in ins.operands[1:]]
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
                "not": np.logical_not}[name]  # fmt: skip
    return lambda mask: function(*(source() for source in sources), out=target, where=mask)


def _float(machine: Machine, ins: Instruction) -> Closure:
    name, kind, flags = ins.opcode[0], ins.opcode[-1], ins.opcode[1:-1]
    if kind == "f32" and flags not in ((), ("rn",), ("full",), ("approx",), ("rnd",)):
        return _careful_float(machine, ins)
    target, sources = machine.registers.write(ins.operands[0], kind), reads(machine, ins, kind)
    function = float_function(name, flags)
    if kind in ("f32", "f16", "f64"):
        if isinstance(function, np.ufunc):
            return lambda mask: function(*sources, out=target, where=mask)
        return lambda mask: put(target, function(*sources), mask)
    return _packed(function, kind, target, sources)


def _packed(function: Any, kind: str, target: Array, sources: list[Array]) -> Closure:
    """bfloat16, and pairs of 16-bit floats."""

    def decode(bits: Array) -> Array:
        return from_bf16(bits) if kind.startswith("bf16") else bits.view(np.float16)

    def encode(x: Array) -> Array:
        if kind.startswith("bf16"):
            return to_bf16(np.asarray(x, np.float32))
        return np.asarray(x).astype(np.float16).view(np.uint16)

    def run(mask: Any) -> None:
        if kind == "bf16":
            put(target, encode(function(*map(decode, sources))), mask)
            return
        pairs = [halves(source) for source in sources]
        sides = [encode(function(*(decode(pair[i]) for pair in pairs))) for i in (0, 1)]
        put(target, joined(*sides), mask)

    return run


def float_function(name: str, flags: tuple[str, ...]) -> Any:
    if name in ("min", "max"):
        return _extreme(name, flags)
    return UNARY_FLOAT[name] if name in UNARY_FLOAT else BINARY_FLOAT[name]


def _careful_float(machine: Machine, ins: Instruction) -> Closure:
    """float32 with .ftz, .sat, .NaN or a rounding of its own."""
    name, flags = ins.opcode[0], ins.opcode[1:-1]
    known = {"rn", "ftz", "sat", "NaN", "approx", "full", "abs", "xorsign"}
    if set(flags) - known or {"xorsign", "abs"} & set(flags):
        raise ValueError(f"modifiers {flags} are not known")
    target = machine.registers.write(ins.operands[0], "f32")
    sources, function = reads(machine, ins, "f32"), float_function(name, flags)
    ftz, saturate = "ftz" in flags, "sat" in flags

    def run(mask: Any) -> None:
        given = [flush(x) for x in sources] if ftz else sources
        value = np.asarray(function(*given)).astype(np.float32)
        if ftz:
            value = flush(value)
        if saturate:
            value = np.fmin(np.fmax(value, np.float32(0)), np.float32(1))
        put(target, value, mask)

    return run


@BINDERS.of("mul", "mad")
def _multiply(machine: Machine, ins: Instruction) -> Closure:
    name, kind = ins.opcode[0], ins.opcode[-1]
    if kind in FLOATS:
        return _float(machine, ins)
    half, registers = ins.opcode[1], machine.registers
    a, b = (registers.read(o, kind) for o in ins.operands[1:3])
    wide = kind[0] + str(2 * int(kind[1:]))
    result = wide if half == "wide" else kind
    target = registers.write(ins.operands[0], result)
    c = registers.read(ins.operands[3], result) if name == "mad" else None

    def product() -> Array:
        if half == "lo":
            return a * b
        if half == "wide":
            return a.astype(TYPES[wide]) * b.astype(TYPES[wide])
        if kind in ("u64", "s64"):
            return _high_half(a, b)
        full: Array = a.astype(TYPES[wide]) * b.astype(TYPES[wide])
        return (full >> full.dtype.type(int(kind[1:]))).astype(a.dtype)

    if c is None:
        return lambda mask: put(target, product(), mask)
    return lambda mask: put(target, product() + c, mask)


def _high_half(a: Array, b: Array) -> Array:
    """Of products of 64 bits, in Python's integers."""
    shape = a.dtype.type
    return np.array([shape(int(x) * int(y) >> 64) for x, y in zip(a, b, strict=True)])


@BINDERS.of("div", "rem")
def _divide(machine: Machine, ins: Instruction) -> Closure:
    name, kind = ins.opcode[0], ins.opcode[-1]
    if kind in FLOATS:
        return _float(machine, ins)
    target = machine.registers.write(ins.operands[0], kind)
    a, b = reads(machine, ins, kind)

    def run(mask: Any) -> None:
        quotient = np.floor_divide(a, b)
        rest = a - quotient * b
        if kind[0] == "s":  # towards zero
            quotient = quotient + ((rest != 0) & ((a < 0) != (b < 0)))
        put(target, quotient if name == "div" else a - quotient * b, mask)

    return run
