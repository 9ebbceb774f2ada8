"""What lanes of a warp do together: shuffles, reductions, votes, ldmatrix, stmatrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.data import address_of
from ptx_machine.fault import Fault, NotHere
from ptx_machine.operands import Binders, Closure, predicate, put
from ptx_machine.parse import Instruction, Operand

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
WARP = 32
ALL = 0xFFFFFFFF


def need_lanes(machine: Machine, mask: Any, members: Array | None = None) -> None:
    """Every active thread's member lanes must be here; those that are wait otherwise."""
    if mask is True and (members is None or (members == ALL).all()):
        return
    here = np.ones(machine.threads, np.bool_) if mask is True else mask
    lanes = here.reshape(-1, WARP)
    wanted = np.full(machine.threads, ALL, np.uint32) if members is None else members
    bits = (wanted.reshape(-1, WARP)[:, :, None] >> np.arange(WARP, dtype=np.uint32)) & 1
    missing = ((bits == 1) & ~lanes[:, None, :]).any(2) & lanes
    own = (wanted >> (np.arange(machine.threads, dtype=np.uint32) % WARP)) & 1
    if (here & (own == 0)).any():
        raise Fault("a lane is not among the members that it names")
    if missing.any():
        raise NotHere(missing.any(1)[:, None].repeat(WARP, 1).reshape(-1) & here)


def _members(machine: Machine, operand: Operand) -> Array | None:
    """None for all lanes."""
    if operand.kind == "number":
        value = int(operand.text.rstrip("U"), 0) & ALL
        if value == ALL:
            return None
    return machine.registers.read(operand, "u32")


@BINDERS.of("shfl")
def _shuffle(machine: Machine, ins: Instruction) -> Closure:
    _, _, mode, _ = ins.opcode
    registers, shared = machine.registers, machine.shared
    target = ins.operands[0]
    outputs = target.parts if target.kind == "pair" else (target,)
    written = registers.write(outputs[0], "b32")
    there = registers.write(outputs[1], "pred") if len(outputs) > 1 else None
    source, lane, clamp = (registers.read(o, "b32") for o in ins.operands[1:4])
    members = _members(machine, ins.operands[4])
    constant = all(o.kind == "number" for o in ins.operands[2:4])
    fixed = shuffle_sources(mode, lane, clamp) if constant else None

    def run(mask: Any) -> None:
        need_lanes(machine, mask, members)
        shared.warp_sync(mask)
        index, valid = fixed or shuffle_sources(mode, lane, clamp)
        if mask is not True and (mask & ~mask[index]).any():
            raise Fault("a shuffle reads a lane that is not here")
        put(written, source[index], mask)
        if there is not None:
            put(there, valid, mask)

    return run


def shuffle_sources(mode: str, lane: Array, clamp: Array) -> tuple[Array, Array]:
    """(thread to read [threads], whether it was in range), as the ISA's pseudocode says."""
    thread = np.arange(len(lane), dtype=np.int64)
    own, b, c = thread % WARP, lane.astype(np.int64) & 31, clamp.astype(np.int64)
    segment = (c >> 8) & 31
    most = (own & segment) | (c & 31 & ~segment)
    if mode == "up":
        wanted, valid = own - b, own - b >= most
    elif mode == "down":
        wanted, valid = own + b, own + b <= most
    elif mode == "bfly":
        wanted, valid = own ^ b, (own ^ b) <= most
    else:
        wanted = (own & segment) | (b & ~segment)
        valid = wanted <= most
    return thread - own + np.where(valid, wanted, own), valid


@BINDERS.of("redux")
def _reduce(machine: Machine, ins: Instruction) -> Closure:
    _, _, operation, kind = ins.opcode
    function: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                     "or": np.bitwise_or, "xor": np.bitwise_xor}[operation]  # fmt: skip
    target = machine.registers.write(ins.operands[0], kind)
    source = machine.registers.read(ins.operands[1], kind)
    members = _members(machine, ins.operands[2])

    def run(mask: Any) -> None:
        need_lanes(machine, mask, members)
        if members is not None and (members != ALL)[... if mask is True else mask].any():
            raise Fault("redux of some lanes only is not known")
        machine.shared.warp_sync(mask)
        whole = function.reduce(source.reshape(-1, WARP), 1, dtype=source.dtype)
        put(target, whole.repeat(WARP), mask)

    return run


@BINDERS.of("vote", "activemask")
def _vote(machine: Machine, ins: Instruction) -> Closure:
    registers = machine.registers
    powers = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
    if ins.opcode[0] == "activemask":
        active = registers.write(ins.operands[0], "b32")

        def tell(mask: Any) -> None:
            here = np.ones(machine.threads, np.bool_) if mask is True else mask
            put(active, (here.reshape(-1, WARP) * powers).sum(1).repeat(WARP), mask)

        return tell
    mode = ins.opcode[2]
    target = registers.write(ins.operands[0], "b32" if mode == "ballot" else "pred")
    given = predicate(machine, ins.operands[1])
    members = _members(machine, ins.operands[2])
    constant = _members(machine, ins.operands[2])

    def run(mask: Any) -> None:
        need_lanes(machine, mask, members)
        machine.shared.warp_sync(mask)
        voting = np.ones(machine.threads, np.bool_) if mask is True else mask
        if constant is not None:
            lane = np.arange(machine.threads, dtype=np.uint32) % WARP
            voting = voting & (((constant >> lane) & 1) == 1)
        votes, who = (given() & voting).reshape(-1, WARP), voting.reshape(-1, WARP)
        result = {
            "ballot": lambda: (votes * powers).sum(1).astype(np.uint32),
            "any": lambda: votes.any(1),
            "all": lambda: (votes | ~who).all(1),
        }[mode]()
        put(target, result.repeat(WARP), mask)

    return run


@BINDERS.of("ldmatrix", "stmatrix")
def _matrix(machine: Machine, ins: Instruction) -> Closure:
    """Matrices of 8 x 8 16-bit elements: lane 8 i + r names row r of matrix i; lane t holds row
    t / 4, elements 2 (t % 4) and the next one of each, or with .trans of its transpose."""
    loading, transposed = ins.opcode[0] == "ldmatrix", "trans" in ins.opcode
    if "m8n8" not in ins.opcode or ins.opcode[-1] != "b16":
        raise Fault("only matrices of 8 x 8 are known")
    count = int(next(p for p in ins.opcode if p in ("x1", "x2", "x4"))[1])
    values, place = ins.operands if loading else ins.operands[::-1]
    arrays = [machine.registers.write(part, "b32") for part in (values.parts or (values,))]
    address = address_of(machine, place, wide=False)
    shared, warps = machine.shared, machine.threads // WARP
    lane = np.arange(WARP)
    if transposed:
        pick = np.stack([(lane % 4 * 2) * 8 + lane // 4, (lane % 4 * 2 + 1) * 8 + lane // 4], 1)
    else:
        pick = lane[:, None] // 4 * 8 + lane[:, None] % 4 * 2 + np.arange(2)
    named = np.tile(lane < 8 * count, warps)

    def run(mask: Any) -> None:
        need_lanes(machine, mask)
        shared.warp_sync(mask)
        rows = named if mask is True else named & mask
        at, thread, granules = shared.places(address(), 16, rows)
        index = (at // 2)[:, None] + np.arange(8)
        own = np.flatnonzero(rows) // (WARP) if mask is not True else None
        present = warps if own is None else len(np.unique(own))
        if loading:
            shared.note_read(granules, thread[:, None])
            flat = shared.typed[2][index].reshape(present, count, 64)
            _spread_matrices(flat, pick, arrays, mask)
            return
        flat = np.zeros((present, count, 64), np.uint16)
        for i, array in enumerate(arrays):
            held = array if mask is True else array[mask]
            flat[:, i, pick] = np.ascontiguousarray(held).view(np.uint16).reshape(present, WARP, 2)
        shared.note_write(granules, thread[:, None])
        shared.typed[2][index] = flat.reshape(-1, 8)

    return run


def _spread_matrices(flat: Array, pick: Array, arrays: list[Array], mask: Any) -> None:
    for i, array in enumerate(arrays):
        held = np.ascontiguousarray(flat[:, i][:, pick]).view(np.uint32).reshape(-1)
        array[... if mask is True else mask] = held


@BINDERS.of("bar")
def _sync(machine: Machine, ins: Instruction) -> Closure:
    """bar.warp.sync; barriers of the CTA are the machine's."""
    members = _members(machine, ins.operands[0])

    def run(mask: Any) -> None:
        need_lanes(machine, mask, members)
        machine.shared.warp_sync(mask)

    return run


@BINDERS.of("elect")
def _elect(machine: Machine, ins: Instruction) -> Closure:
    target = ins.operands[0]
    flag = machine.registers.write(target.parts[1], "pred")

    def run(mask: Any) -> None:
        need_lanes(machine, mask)
        put(flag, np.arange(machine.threads) % WARP == 0, mask)

    return run
