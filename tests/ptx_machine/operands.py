"""Short ways to bind operands; shared by all families of instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.parse import Instruction, Operand

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
Closure = Callable[[Any], None]
Binder = Callable[["Machine", Instruction], Closure]
TINY = np.float32(2.0**-126)


class Binders(dict[str, Binder]):
    """Binders by the first part of the opcode."""

    def of(self, *names: str) -> Callable[[Binder], Binder]:
        def add(binder: Binder) -> Binder:
            for name in names:
                self[name] = binder
            return binder

        return add


def reads(machine: Machine, instruction: Instruction, kind: str, begin: int = 1) -> list[Array]:
    """Operands from `begin` on, all of one type."""
    return [machine.registers.read(o, kind) for o in instruction.operands[begin:]]


def predicate(machine: Machine, operand: Operand) -> Callable[[], Array]:
    """A predicate operand, which may be negated."""
    array = machine.registers.read(operand, "pred")
    return (lambda: ~array) if operand.negated else (lambda: array)


def put(target: Array, value: Array, mask: Any) -> None:
    np.copyto(target, value, where=mask, casting="unsafe")


def flush(x: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def from_bf16(bits: Array) -> Array:
    """uint16 to float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 to uint16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def halves(bits: Array) -> tuple[Array, Array]:
    """Low and high 16 bits of uint32."""
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def joined(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
