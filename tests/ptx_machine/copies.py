"""cp.async: copies of a thread that arrive when it waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.data import address_of
from ptx_machine.fault import Fault
from ptx_machine.hopper import copy_box
from ptx_machine.operands import Binders, Closure, predicate
from ptx_machine.parse import Instruction
from ptx_machine.shared import IN_FLIGHT, Shared

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
# (threads, granules, addresses, bytes): what one instruction left.
Copies = tuple[Array, Array, Array, Array]


class CopyGroups:
    """cp.async of each thread: copied when the thread waits, not before."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.reset()

    def reset(self) -> None:
        self.open: list[Copies] = []
        self.committed: list[tuple[Array, list[Copies]]] = []
        self.count = np.zeros(self.threads, np.int64)  # groups of each thread that are pending

    def commit(self, threads: Array) -> None:
        self.committed.append((threads.copy(), _of(self.open, threads)))
        self.open = _of(self.open, ~threads)
        self.count[threads] += 1

    def wait(self, shared: Shared, threads: Array, most: int) -> None:
        """Until at most `most` groups of these threads are pending."""
        while (late := threads & (self.count > most)).any():
            index = next(i for i, (who, _) in enumerate(self.committed) if (who & late).any())
            who, parts = self.committed.pop(index)
            if (who & ~late).any():  # others have committed with them, but do not wait yet
                self.committed.insert(index, (who & ~late, _of(parts, ~late)))
            for part in _of(parts, late):
                self._land(shared, *part)
            self.count[who & late] -= 1

    def land_all(self, shared: Shared, threads: Array) -> None:
        self.commit(threads)
        self.wait(shared, threads, 0)

    def pending(self, threads: Array) -> bool:
        return bool(self.open) or bool(self.count[threads].any())

    def _land(
        self, shared: Shared, thread: Array, granules: Array, address: Array, values: Array
    ) -> None:
        shared.written[granules] = shared.time
        shared.writer[granules] = thread[:, None]
        shared.write_sync[granules] = shared.sync[thread][:, None]
        shared.unfenced[granules] = shared.fences[thread][:, None]
        shared.data[address[:, None] + np.arange(values.shape[1])] = values


def _of(parts: list[Copies], threads: Array) -> list[Copies]:
    """What these threads copy."""
    mine = [(part, threads[part[0]]) for part in parts]
    return [(t[m], g[m], a[m], v[m]) for (t, g, a, v), m in mine if m.any()]


def bytes_kept(machine: Machine, ins: Instruction, size: int) -> Callable[[], Array]:
    """() -> how many of the `size` bytes of cp.async come from the source, [threads]: the operand
    is a number, or a predicate that says to ignore it. The rest is zeros."""
    if len(ins.operands) < 4:
        whole = np.full(machine.threads, size, np.uint32)
        return lambda: whole
    operand = ins.operands[3]
    if operand.kind == "register" and machine.registers.array(operand.text).dtype == np.bool_:
        ignored = predicate(machine, operand)
        return lambda: np.where(ignored(), 0, size).astype(np.uint32)
    kept = machine.registers.read(operand, "u32")
    return lambda: kept


@BINDERS.of("cp")
def _copy(machine: Machine, ins: Instruction) -> Closure:
    groups, shared, memory = machine.groups, machine.shared, machine.memory
    everybody = np.ones(machine.threads, np.bool_)
    if ins.opcode[:3] == ("cp", "async", "bulk"):
        return copy_box(machine, ins)
    if ins.opcode[1] != "async":
        raise Fault("only cp.async is known")
    if ins.opcode[2] == "commit_group":
        return lambda mask: groups.commit(everybody if mask is True else mask)
    if ins.opcode[2] in ("wait_group", "wait_all"):
        most = int(ins.operands[0].text, 0) if ins.operands else 0

        def wait(mask: Any) -> None:
            threads = everybody if mask is True else mask
            if ins.opcode[2] == "wait_all":
                groups.commit(threads)
            groups.wait(shared, threads, most)

        return wait
    target = address_of(machine, ins.operands[0], wide=False)
    source = address_of(machine, ins.operands[1], wide=True)
    size = int(ins.operands[2].text, 0)
    kept = bytes_kept(machine, ins, size)
    if "cg" in ins.opcode and size != 16:
        raise Fault("cp.async.cg copies 16 bytes")

    def run(mask: Any) -> None:
        at, thread, granules = shared.places(target(), size, mask)
        values = np.zeros((len(thread), size), np.uint8)
        where = source()
        left = kept()
        if (left[thread] > size).any():
            raise Fault(f"cp.async of {int(left[thread].max())} bytes out of {size}")
        for count in np.unique(left[thread]):
            if not count:
                continue
            some = left == count if mask is True else mask & (left == count)
            if (where[some] & np.uint64(size - 1)).any():
                raise Fault(f"misaligned: cp.async of {size} bytes from {int(where[some][0]):#x}")
            loaded = memory.load_bytes(where, int(count), some)
            values[some[thread], :count] = loaded
        shared.check_write(granules, thread[:, None])
        shared.written[granules] = IN_FLIGHT
        shared.writer[granules] = thread[:, None]
        groups.open.append((thread, granules, at, values))

    return run
