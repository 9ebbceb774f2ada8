"""Arithmetic, logic, comparisons and selection (PTX ISA, "Instruction Set").

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


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Any:
    """Ordered ones are false for NaN, those that end with u are true."""
    if kind not in FLOATS:
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u"):
        return lambda a, b: COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: COMPARE[name](a, b) & ~(np.isnan(a) | np.isnan(b))


@BINDERS.of("setp")
def _compare(machine: Machine, ins: Instruction) -> Closure:
    kind, flags = ins.opcode[-1], [f for f in ins.opcode[1:-1] if f != "ftz"]
    registers, target = machine.registers, ins.operands[0]
    a, b = (registers.read(o, kind) for o in ins.operands[1:3])
    function = _comparison(flags[0], kind)
    outputs = target.parts if target.kind == "pair" else (target,)
    arrays = [registers.write(o, "pred") for o in outputs]
    combine, third = None, None
    if len(flags) > 1:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[flags[1]]
        third = predicate(machine, ins.operands[3])
    bf16, ftz = kind == "bf16", "ftz" in ins.opcode

    def run(mask: Any) -> None:
        x, y = (from_bf16(a), from_bf16(b)) if bf16 else (a, b)
        if ftz:
            x, y = flush(x), flush(y)
        found = function(x, y)
        for array, value in zip(arrays, (found, ~found), strict=False):
            put(array, value if combine is None else combine(value, third()), mask)  # type: ignore[misc]

    if kind not in FLOATS and combine is None and len(arrays) == 1:
        (only,) = arrays
        return lambda mask: function(a, b, out=only, where=mask)
    return run


@BINDERS.of("set")
def _compare_halves(machine: Machine, ins: Instruction) -> Closure:
    """set.CMP.u32.f16x2: ones in each half where the halves compare so."""
    comparison, *kinds = ins.opcode[1:]
    if kinds != ["u32", "f16x2"]:
        raise ValueError("set is only known as set.*.u32.f16x2")
    function = _comparison(comparison, "f16")
    a, b = (machine.registers.read(operand, "u32") for operand in ins.operands[1:])
    target = machine.registers.write(ins.operands[0], "u32")

    def run(mask: Any) -> None:
        found = function(a.view(np.float16), b.view(np.float16))
        put(target, np.where(found, 0xFFFF, 0).astype(np.uint16).view(np.uint32), mask)

    return run


@BINDERS.of("selp")
def _select(machine: Machine, ins: Instruction) -> Closure:
    kind, registers = ins.opcode[-1], machine.registers
    target = registers.write(ins.operands[0], kind)
    a, b = (registers.read(o, kind) for o in ins.operands[1:3])
    choice = predicate(machine, ins.operands[3])
    return lambda mask: put(target, np.where(choice(), a, b), mask)
