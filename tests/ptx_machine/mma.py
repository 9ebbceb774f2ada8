"""mma.sync: products of tensor cores, exact products added in float32.

Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4 and t = lane % 4, A's
register i holds rows g + 8 (i % 2) and columns 2 t + 8 (i / 2) and the next one, B's register i
rows 2 t + 8 i and the next one of column g, C's i row g + 8 (i / 2), column 2 t + i % 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.operands import Binders, Closure, from_bf16
from ptx_machine.parse import Instruction
from ptx_machine.warp import WARP, need_lanes

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
LANE = np.arange(WARP)
GROUP, TURN = LANE // 4, LANE % 4


def numbers(bits: Array, kind: str) -> Array:
    """float32 of packed registers [..., n] uint32: two 16-bit floats each, or one tf32."""
    if kind == "tf32":  # the last 13 bits are not looked at
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    wide = from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)
    return wide.reshape(*bits.shape[:-1], -1)


def a_places(k: int, each: int) -> tuple[Array, Array]:
    """(row, column) [lane, register * each] of A [16, k]; `each` elements a register."""
    register = np.arange(16 * k // WARP // each)
    row = GROUP[:, None] + 8 * (register % 2)
    column = each * TURN[:, None] + 4 * each * (register // 2)
    return _apart(row, column, each, 0, 1)


def b_places(k: int, each: int) -> tuple[Array, Array]:
    """(row, column) of B [k, 8]."""
    register = np.arange(8 * k // WARP // each)
    row = each * TURN[:, None] + 4 * each * register
    return _apart(row, GROUP[:, None] + 0 * register, each, 1, 0)


def _apart(row: Array, column: Array, each: int, dr: int, dc: int) -> tuple[Array, Array]:
    step = np.arange(each)
    return tuple(  # type: ignore[return-value]
        (x[:, :, None] + d * step).reshape(WARP, -1) for x, d in ((row, dr), (column, dc))
    )


C_ROW = GROUP[:, None] + 8 * (np.arange(4) // 2)
C_COLUMN = 2 * TURN[:, None] + np.arange(4) % 2


@BINDERS.of("mma")
def _product(machine: Machine, ins: Instruction) -> Closure:
    shape, kinds = ins.opcode[3], ins.opcode[6:]
    kind = kinds[1]
    if ins.opcode[4:6] != ("row", "col") or kinds[0] != "f32" or kinds[3] != "f32":
        raise ValueError("this product is not known")
    k = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}[shape]
    each = 1 if kind == "tf32" else 2
    registers = machine.registers
    target = [registers.write(part, "f32") for part in ins.operands[0].parts]
    a, b = ([registers.read(p, "b32") for p in ins.operands[i].parts] for i in (1, 2))
    c = [registers.read(part, "f32") for part in ins.operands[3].parts]
    a_at, b_at, warps = a_places(k, each), b_places(k, each), machine.threads // WARP
    a_from, b_from = _inverse(a_at, (16, k)), _inverse(b_at, (k, 8))
    c_from = _inverse((C_ROW, C_COLUMN), (16, 8))
    c_flat = (C_ROW * 8 + C_COLUMN).reshape(-1)

    def gather(parts: list[Array], where: Array, shape: tuple[int, int]) -> Array:
        """[warps, *shape]"""
        held = numbers(np.stack(parts, 1).reshape(warps, WARP, -1), kind)
        return held.reshape(warps, -1)[:, where].reshape(warps, *shape)

    def run(mask: Any) -> None:
        need_lanes(machine, mask)
        left, right = gather(a, a_from, (16, k)), gather(b, b_from, (k, 8))
        sums = np.stack(c, 1).reshape(warps, -1)[:, c_from].reshape(warps, 16, 8)
        result = np.matmul(left, right) + sums
        held = result.reshape(warps, -1)[:, c_flat].reshape(machine.threads, 4)
        for i, array in enumerate(target):
            np.copyto(array, held[:, i], where=mask)

    return run


def _inverse(at: tuple[Array, Array], shape: tuple[int, int]) -> Array:
    """For each element of the matrix where the registers [lane, value] hold it."""
    flat = (at[0] * shape[1] + at[1]).reshape(-1)
    inverse = np.empty(shape[0] * shape[1], np.int64)
    inverse[flat] = np.arange(flat.size)
    return inverse
