"""Comparisons and selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.arithmetic import FLOATS
from ptx_machine.operands import Binders, Closure, flush, from_bf16, predicate, put
from ptx_machine.parse import Instruction

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
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
