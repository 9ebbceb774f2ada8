"""Runs a kernel, one CTA after the other, all threads of a CTA together.

Of the threads that can go on, those at the lowest place of the program go on together, until the
next place where others could join them: in code of a compiler that is where branches meet again.
An instruction of the whole warp waits for its lanes, bar.sync for all threads of the CTA; a wait
that cannot end is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine import (
    arithmetic,
    bits,
    comparisons,
    conversions,
    copies,
    data,
    hopper,
    mma,
    warp,
    wgmma,
)
from ptx_machine.fault import Fault, NotHere, Stalled
from ptx_machine.memory import Memory
from ptx_machine.parse import Instruction, Program
from ptx_machine.registers import BITS, Registers
from ptx_machine.shared import Shared

Array = NDArray[Any]
Closure = Callable[[Any], None]  # takes the mask: True, or bool [threads]
FAMILIES = (
    arithmetic, bits, comparisons, conversions, copies, data, warp, mma, wgmma, hopper,
)  # fmt: skip
CONTROL = ("bra", "ret", "exit", "bar", "barrier")
BUDGET = 2_000_000  # instructions of a CTA


class Machine:
    """One kernel for one number of threads."""

    def __init__(self, program: Program, threads: int, shared_bytes: int = 0) -> None:
        self.program, self.threads = program, threads
        if program.threads not in (0, threads):
            raise Fault(f"{program.name} wants {program.threads} threads, got {threads}")
        self.registers = Registers(program, threads)
        self.memory = Memory()
        self._place_parameters()
        self.groups = copies.CopyGroups(threads)
        self.products = wgmma.Pending(threads)
        self.barriers = hopper.Barriers()
        self.kinds = [_kind(i) for i in program.instructions]
        self._place_variables(shared_bytes)
        self.targets = [self._target(i) for i in program.instructions]
        self.ends = self._block_ends()
        self.code = [self._bind(i) for i in program.instructions]
        self.guards = [self._guard(i) for i in program.instructions]

    def _place_parameters(self) -> None:
        """Side by side; their names stand for addresses that count from the first."""
        self.parameter_begins: dict[str, int] = {}
        end = 0
        for name, _, size in self.program.parameters:
            end = -(-end // 16) * 16
            self.parameter_begins[name], end = end, end + size
        self.parameter_bytes = np.zeros(end, np.uint8)
        self.registers.symbols.update(self.parameter_begins)

    def _place_variables(self, dynamic: int) -> None:
        end = 0
        for variable in self.program.variables:
            if variable.space == "shared":
                begin = -(-end // variable.align) * variable.align
                self.registers.symbols[variable.name] = begin
                end = begin + variable.size
            else:
                width = np.dtype(f"u{max(int(variable.kind[1:]) // 8, 1)}")
                values = np.zeros(variable.size, np.uint8)
                given = np.array(variable.values, width).view(np.uint8)
                values[: given.size] = given
                address = self.memory.register_bytes(values, variable.name)
                self.registers.symbols[variable.name] = address
        self.constants = len(self.memory.storages)
        self.shared_bytes = end + dynamic
        opcodes = [
            i.opcode for i in self.program.instructions
            if i.opcode[0] in ("ld", "st", "atom", "red", "cp")
            and any(part.startswith("shared") for part in i.opcode)
        ]  # fmt: skip
        generic = any(
            i.opcode[0] in ("ld", "st") and i.opcode[1][1:].isdigit()
            for i in self.program.instructions
        )
        granule = min([data.access_bytes(o) for o in opcodes], default=4)
        self.shared = Shared(self.shared_bytes, self.threads, 1 if generic else min(granule, 4))

        self.shared.sees_races = "mbarrier" not in self.kinds

    def _target(self, instruction: Instruction) -> int:
        if instruction.opcode[0] != "bra":
            return -1
        return self.program.labels[instruction.operands[0].text]

    def _block_ends(self) -> list[int]:
        """For every instruction the end of its run: the next branch, barrier or place to join."""
        count = len(self.kinds)
        joins = set(self.targets) | {count}
        ends, end = [0] * count, count
        for i in reversed(range(count)):
            if i + 1 in joins or self.kinds[i] in CONTROL:
                end = i + 1
            ends[i] = end
        return ends

    def _bind(self, instruction: Instruction) -> Closure:
        if _kind(instruction) in CONTROL:
            return lambda mask: None
        try:
            for family in FAMILIES:
                if instruction.opcode[0] in family.BINDERS:
                    closure = family.BINDERS[instruction.opcode[0]](self, instruction)
                    return self._predicated(instruction, closure)
            raise Fault("this instruction is not known")
        except (Fault, KeyError, IndexError, ValueError) as error:
            raise Fault(
                f"{self.program.name}, line {instruction.line}: {instruction.text}: {error!r}"
            ) from error

    def _guard(self, instruction: Instruction) -> Callable[[], Array] | None:
        predicate = instruction.predicate
        if predicate is None:
            return None
        array = self.registers.array(predicate.text)
        return (lambda: ~array) if predicate.negated else (lambda: array.copy())

    def _predicated(self, instruction: Instruction, closure: Closure) -> Closure:
        guard = self._guard(instruction)
        if guard is None:
            return closure

        def run(mask: Any) -> None:
            some = guard() if mask is True else guard() & mask
            if some.all():
                closure(True)
            elif some.any():
                closure(some)

        return run

    # A launch.

    def launch(
        self, grid: Sequence[int], arguments: Sequence[int], order: np.random.Generator | None
    ) -> None:
        """`arguments` are the bits of the kernel's parameters; `order` shuffles the CTAs."""
        names = [name for name, _, _ in self.program.parameters]
        if len(arguments) != len(names):
            raise Fault(f"{self.program.name} takes {len(names)} arguments, got {len(arguments)}")
        for (name, _, size), value in zip(self.program.parameters, arguments, strict=True):
            begin = self.parameter_begins[name]
            given = np.frombuffer(value.to_bytes(size, "little"), np.uint8)
            self.parameter_bytes[begin : begin + size] = given
        special = self.registers.special
        for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
            special[f"%nctaid.{axis}"][:] = size
            special[f"%ntid.{axis}"][:] = self.threads if axis == "x" else 1
        special["%dynamic_smem_size"][:] = self.shared_bytes
        ctas = list(itertools.product(*(range(size) for size in grid)))
        if order is not None:
            order.shuffle(ctas)
        with np.errstate(all="ignore"):
            for cta in ctas:
                self._run_cta(cta)

    def _run_cta(self, cta: tuple[int, ...]) -> None:
        for axis, number in zip("xyz", cta, strict=False):
            self.registers.special[f"%ctaid.{axis}"][:] = number
        self.cta = cta
        self.registers.poison()
        self.shared.reset()
        self.groups.reset()
        self.products.reset()
        self.barriers.reset()
        self.arrived: dict[int, int] = {}  # at named barriers, without waiting there
        self.stalled = np.zeros(self.threads, np.bool_)  # waits for an mbarrier
        self.pcs = np.zeros(self.threads, np.int64)
        self.alive = np.ones(self.threads, np.bool_)
        self.barrier = np.full(self.threads, -1)  # that a thread waits at
        self.parked = np.zeros(self.threads, np.bool_)  # waits for lanes of its warp
        together: int | None = 0  # where all threads are, if they are at one place
        steps = 0
        while True:
            if together is not None:
                pc, mask = together, True
            else:
                pc, mask = self._pick()
                if pc < 0:
                    return
            steps += self.ends[pc] - pc
            if steps > BUDGET:
                raise self._fault(pc, f"more than {BUDGET} instructions: it does not end")
            together = self._run(pc, mask)
            if together == -1:
                return

    def _pick(self) -> tuple[int, Any]:
        free = self.alive & (self.barrier < 0) & ~self.stalled
        ready = free & ~self.parked
        if not ready.any():
            if not self.alive.any():
                return -1, None
            if self.stalled.any():
                pc = int(self.pcs[self.stalled].min())
                raise self._fault(pc, f"{int(self.stalled.sum())} threads wait here for ever")
            if self.parked.any():
                pc = int(self.pcs[self.parked].min())
                raise self._fault(pc, "waits for lanes of its warp that do not come")
            if not self.alive.all() or len(set(self.barrier.tolist())) > 1:
                pc = int(self.pcs[self.alive].min()) - 1
                gone = int((~self.alive).sum())
                raise self._fault(pc, f"a barrier that {gone} threads never reach, or several")
            self.shared.barrier()
            self.barrier[:] = -1
            return self._pick()
        pc = int(self.pcs[ready].min())
        mask = (self.pcs == pc) & free
        self.parked[mask] = False
        return pc, (True if mask.all() else mask)

    def _run(self, pc: int, mask: Any) -> int | None:
        """Up to the end of the run; the place where all threads are then, -1 if they are done."""
        code, end = self.code, self.ends[pc]
        i = pc
        while i < end:
            try:
                code[i](mask)
            except NotHere as missing:
                waiting = np.asarray(missing.threads)
                self.pcs[waiting] = i
                if isinstance(missing, Stalled):
                    self.stalled |= waiting
                else:
                    self.parked |= waiting
                mask = (np.ones(self.threads, np.bool_) if mask is True else mask) & ~waiting
                if not mask.any():
                    return None
                continue
            except Fault as fault:
                raise self._fault(i, str(fault)) from fault
            i += 1
        return self._control(end - 1, mask)

    def _control(self, last: int, mask: Any) -> int | None:
        kind, following = self.kinds[last], last + 1
        if kind not in CONTROL:
            return self._move(mask, following)
        guard = self.guards[last]
        taking = mask
        if guard is not None:
            taking = guard() if mask is True else guard() & mask
            if taking.all():
                taking = True
            elif not taking.any():
                return self._move(mask, following)
        if kind == "bra":
            if taking is True or taking is mask:
                return self._move(mask, self.targets[last])
            self._move(mask, following)
            self.pcs[taking] = self.targets[last]
            return None
        if kind in ("ret", "exit"):
            if taking is True:
                return self._finish(last)
            self._move(mask, following)
            self.alive &= ~taking
            self._check_finished(last, taking)
            return None
        return self._meet(last, mask, taking)

    def _meet(self, last: int, mask: Any, taking: Any) -> int | None:
        """bar.sync or bar.arrive of all threads, or of as many as it says."""
        instruction, following = self.program.instructions[last], last + 1
        counted = len(instruction.operands) > 1
        if taking is True and not counted:
            self.shared.barrier()
            return following
        self._move(mask, following)
        taking = np.broadcast_to(taking, self.threads)
        numbers = [self.registers.read(operand, "u32") for operand in instruction.operands]
        for number in np.unique(numbers[0][taking]).tolist():  # warps may name different ones
            here = taking & (numbers[0] == number)
            if instruction.opcode[1] == "arrive":
                self.arrived[number] = self.arrived.get(number, 0) + int(here.sum())
            else:
                self.barrier[here] = number
            if not counted:
                continue
            there = int((self.barrier == number).sum()) + self.arrived.get(number, 0)
            wanted = int(numbers[1][here][0])
            if there > wanted:
                raise self._fault(last, f"{there} threads at a barrier of {wanted}")
            if there == wanted:
                self.shared.barrier()
                self.barrier[self.barrier == number] = -1
                self.arrived[number] = 0
        return None

    def _move(self, mask: Any, to: int) -> int | None:
        if mask is True:
            self.pcs[:] = to
            return to
        self.pcs[mask] = to
        return None

    def _finish(self, last: int) -> int:
        self._check_finished(last, np.ones(self.threads, np.bool_))
        self.alive[:] = False
        return -1

    def _check_finished(self, last: int, threads: Array) -> None:
        if self.groups.pending(threads):
            self.groups.land_all(self.shared, threads)  # a thread that ends waits for its copies
        if self.products.pending(threads):
            raise self._fault(last, "ends without waiting for wgmma")

    def _fault(self, pc: int, what: str) -> Fault:
        instruction = self.program.instructions[min(pc, len(self.kinds) - 1)]
        return Fault(
            f"{self.program.name}, CTA {self.cta}, line {instruction.line}"
            f" ({instruction.source or 'no source'}): {instruction.text[:200]}: {what}"
        )

    def new_memory(self) -> Memory:
        """For the next launch: only the module's own variables stay."""
        self.memory.storages[self.constants :] = []
        self.memory._known.clear()
        self.memory._keep.clear()
        return self.memory


def _kind(instruction: Instruction) -> str:
    return ".".join(instruction.opcode[: 2 if "warp" in instruction.opcode else 1])


def bits_of(value: Any, size: int) -> int:
    """An argument as the unsigned number that its bits are."""
    return int(np.array(value).view(BITS[size])[()])
