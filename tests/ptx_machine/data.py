"""Moves, loads, stores and atomics; copies are in copies.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault
from ptx_machine.operands import Binders, Closure, predicate, put
from ptx_machine.parse import SIZES, Instruction, Operand
from ptx_machine.registers import BITS, SHARED_WINDOW, TYPES

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
SPACES = ("global", "shared", "shared::cta", "param", "const", "local")
SHARED_SPACES = ("shared", "shared::cta")
ATOMICS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def access_bytes(opcode: tuple[str, ...]) -> int:
    """Width of one element; cp.async moves at least four bytes."""
    return 4 if opcode[0] == "cp" else SIZES[opcode[-1]]


@BINDERS.of("mov")
def _move(machine: Machine, ins: Instruction) -> Closure:
    kind, registers = ins.opcode[-1], machine.registers
    target, source = ins.operands
    if source.kind == "vector":
        return _pack(machine, target, source.parts)
    if target.kind == "vector":
        return _unpack(machine, target.parts, source)
    written = registers.write(target, kind)
    if kind == "pred":
        given = predicate(machine, source)
        return lambda mask: np.copyto(written, given(), where=mask)
    if source.kind == "name" and source.text in registers.special:
        special = registers.special[source.text]
        return lambda mask: np.copyto(written, special, where=mask, casting="unsafe")
    value = registers.read(source, kind)
    return lambda mask: np.copyto(written, value, where=mask)


def _part(machine: Machine, operand: Operand, bits: int) -> Array:
    return machine.registers.read(operand, f"b{bits}")


def _pack(machine: Machine, target: Operand, parts: tuple[Operand, ...]) -> Closure:
    whole = 8 * machine.registers.width(target)
    written, each = machine.registers.write(target, f"b{whole}"), whole // len(parts)
    sources = [_part(machine, part, each) for part in parts]

    def run(mask: Any) -> None:
        value = np.stack(sources, 1).view(written.dtype)[:, 0]
        put(written, value, mask)

    return run


def _unpack(machine: Machine, parts: tuple[Operand, ...], source: Operand) -> Closure:
    whole = 8 * machine.registers.width(source)
    given, each = machine.registers.read(source, f"b{whole}"), whole // len(parts)
    targets = [machine.registers.write(part, f"b{each}") for part in parts]

    def run(mask: Any) -> None:
        pieces = given.copy()[:, None].view(BITS[each // 8])
        for i, target in enumerate(targets):
            put(target, pieces[:, i], mask)

    return run


def address_of(machine: Machine, operand: Operand, wide: bool) -> Any:
    """() -> addresses [threads], uint64 in global and uint32 in shared memory."""
    base, registers = operand.parts[0], machine.registers
    kind = "u64" if wide else "u32"
    if base.kind == "register" and registers.width(base) != (8 if wide else 4):
        if not wide:
            whole = registers.read(base, "u64")
            return lambda: (whole + np.uint64(operand.offset % 2**64)).astype(np.uint32)
        raise Fault(f"{base.text} is no 64-bit address")
    array = registers.read(base, kind)
    if not operand.offset:
        return lambda: array
    offset = array.dtype.type(operand.offset % 2 ** (64 if wide else 32))
    return lambda: array + offset


def space_of(opcode: tuple[str, ...]) -> str:
    """ "" for a generic address."""
    return next((part for part in opcode if part in SPACES), "")


def elements_of(opcode: tuple[str, ...], operand: Operand) -> tuple[Operand, ...]:
    if any(part in ("v2", "v4", "v8") for part in opcode) or operand.kind == "vector":
        return operand.parts
    return (operand,)


def _widened(value: Array, size: int) -> Array:
    """Of a type narrower than its register: with zeros, or its sign."""
    if value.dtype.itemsize == size:
        return value
    signed = np.issubdtype(value.dtype, np.signedinteger)
    return value.astype(f"i{size}" if signed else f"u{size}")


@BINDERS.of("ld", "ldu")
def _load(machine: Machine, ins: Instruction) -> Closure:
    kind, space = ins.opcode[-1], space_of(ins.opcode)
    registers, memory, dtype = machine.registers, machine.memory, TYPES[kind]
    elements = elements_of(ins.opcode, ins.operands[0])
    targets = [
        (np.empty(machine.threads, dtype), SIZES[kind]) if e.kind == "sink"
        else (registers.array(e.text), registers.width(e)) for e in elements
    ]  # fmt: skip
    if space == "param":
        return _load_parameter(machine, ins, targets)
    shared = machine.shared
    if space in SHARED_SPACES:
        address = address_of(machine, ins.operands[1], wide=False)

        def run_shared(mask: Any) -> None:
            values = shared.load(address(), dtype, len(targets), mask)
            for (target, size), value in zip(targets, values, strict=True):
                wide = _widened(value, size)
                target.view(wide.dtype)[... if mask is True else mask] = wide

        return run_shared
    address = address_of(machine, ins.operands[1], wide=True)

    def run(mask: Any) -> None:
        where = address()
        if not space and (where[... if mask is True else mask] >= SHARED_WINDOW).all():
            values = machine.shared.load(
                (where - np.uint64(SHARED_WINDOW)).astype(np.uint32), dtype, len(targets), mask
            )
            if mask is not True:
                values = [_spread(value, mask) for value in values]
        else:
            values = memory.load(where, dtype, len(targets), mask)
        for (target, size), value in zip(targets, values, strict=True):
            wide = _widened(value, size)
            put(target.view(wide.dtype), wide, mask)

    return run


def _spread(value: Array, mask: Array) -> Array:
    whole = np.zeros(mask.shape, value.dtype)
    whole[mask] = value
    return whole


def _load_parameter(
    machine: Machine, ins: Instruction, targets: list[tuple[Array, int]]
) -> Closure:
    """Of one value each; structures are read in pieces, at an offset or an address."""
    source, dtype = ins.operands[1], TYPES[ins.opcode[-1]]
    place, offset, size = source.parts[0], source.offset, np.dtype(dtype).itemsize
    begins = machine.parameter_begins
    at = begins[place.text] + offset if place.text in begins else None
    address = None if at is not None else address_of(machine, source, wide=True)

    def run(mask: Any) -> None:
        raw = machine.parameter_bytes
        for i, (target, width) in enumerate(targets):
            if address is None:
                value = raw[at + i * size : at + (i + 1) * size].view(dtype)
                wide = _widened(value, width)
                put(target.view(wide.dtype), wide[0], mask)
                continue
            where = address().view(np.int64) + i * size
            active = where if mask is True else where[mask]
            if active.min() < 0 or active.max() + size > len(raw) or (active % size).any():
                raise Fault(f"parameter bytes {active.min()} to {active.max()} of {len(raw)}")
            places = where if mask is True else np.where(mask, where, 0)
            value = raw[places[:, None] + np.arange(size)].view(dtype)[:, 0]
            put(target.view(_widened(value, width).dtype), _widened(value, width), mask)

    return run


@BINDERS.of("st")
def _store(machine: Machine, ins: Instruction) -> Closure:
    kind, space = ins.opcode[-1], space_of(ins.opcode)
    registers, memory, shared = machine.registers, machine.memory, machine.shared
    dtype, bits = TYPES[kind], BITS[SIZES[kind]]
    sources = []
    for element in elements_of(ins.opcode, ins.operands[1]):
        if element.kind != "register":
            sources.append(registers.constant(element, dtype).view(bits))
        else:
            sources.append(registers.array(element.text))
    narrow = [source.dtype.itemsize != np.dtype(bits).itemsize for source in sources]
    in_shared = space in SHARED_SPACES
    address = address_of(machine, ins.operands[0], wide=not in_shared)

    def run(mask: Any) -> None:
        values = [s.astype(bits) if cut else s for s, cut in zip(sources, narrow, strict=True)]
        where = address()
        generic = not space and (where[... if mask is True else mask] >= SHARED_WINDOW).all()
        if not in_shared and not generic:
            memory.store(where, values, mask)
            return
        if mask is not True:
            values = [value[mask] for value in values]
        if generic:
            where = (where - np.uint64(SHARED_WINDOW)).astype(np.uint32)
        shared.store(where, values, mask)

    return run


@BINDERS.of("cvta")
def _to_generic(machine: Machine, ins: Instruction) -> Closure:
    """Global addresses are generic ones; shared memory has a window."""
    back, kind = "to" in ins.opcode, ins.opcode[-1]
    target = machine.registers.write(ins.operands[0], kind)
    source = machine.registers.read(ins.operands[1], kind)
    shift = SHARED_WINDOW if any(part in SHARED_SPACES for part in ins.opcode) else 0
    offset = np.array((-shift if back else shift) % 2**64, np.uint64)
    return lambda mask: put(target, source + offset.astype(source.dtype), mask)


@BINDERS.of("atom", "red")
def _atomic(machine: Machine, ins: Instruction) -> Closure:
    """One thread after the other, in the order of their numbers."""
    kind, space = ins.opcode[-1], space_of(ins.opcode)
    operation = next(p for p in ins.opcode if p in (*ATOMICS, "exch", "cas", "inc"))
    returns = ins.opcode[0] == "atom"
    place, *values = ins.operands[1:] if returns else ins.operands
    if space in SHARED_SPACES or operation == "inc":
        raise Fault("atomics of shared memory are not known")
    address, dtype = address_of(machine, place, wide=True), TYPES[kind]
    given = [machine.registers.read(value, kind) for value in values]
    target = machine.registers.write(ins.operands[0], kind) if returns else None

    def run(mask: Any) -> None:
        where, width = address(), np.dtype(dtype).itemsize
        for storage, offset, here in machine.memory.locate(where, width, mask):
            data, index = storage.seen_as(dtype), offset // width
            for thread in np.flatnonzero(np.broadcast_to(here, where.shape)):
                old = data[index[thread]]
                new = given[-1][thread]
                if operation == "cas":
                    new = new if old == given[0][thread] else old
                elif operation != "exch":
                    new = ATOMICS[operation](old, new)
                data[index[thread]] = new
                if target is not None:
                    target[thread] = old

    return run


@BINDERS.of("fence", "membar")
def _fence(machine: Machine, ins: Instruction) -> Closure:
    """Only the fence before wgmma means something here: memory is in order otherwise."""
    shared = machine.shared
    if "proxy" not in ins.opcode:
        return lambda mask: None

    def run(mask: Any) -> None:
        shared.fences[... if mask is True else mask] += 1

    return run


@BINDERS.of("prefetch", "prefetchu", "nanosleep", "griddepcontrol", "discard", "applypriority")
def _nothing(machine: Machine, ins: Instruction) -> Closure:
    return lambda mask: None
