"""What a kernel's warps do to memory and to the issue slots, counted while the machine runs it.

`counted(machine)` wraps the machine's instructions; a machine that is not counted pays nothing.
A request is one instruction of one warp.

- Global memory moves in sectors of 32 bytes. `least` is how many the bytes of a request would fill
  if they lay side by side.
- Shared memory has 32 banks of 4 bytes. A request is served in groups of lanes that fit the banks:
  32 lanes of up to 4 bytes, 16 of 8, 8 of 16; ldmatrix, stmatrix and cp.async of 16 bytes by 8. A
  group takes as many passes as the bank that most of its words share has words; `least` is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.copies import bytes_kept
from ptx_machine.data import SHARED_SPACES, address_of, elements_of, space_of
from ptx_machine.machine import Closure, Machine
from ptx_machine.parse import SIZES, Instruction

Array = NDArray[Any]
WARP, SECTOR, BANKS, WORD = 32, 32, 32, 4
SPECIAL = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div")
CONTROL = ("bra", "bar", "barrier", "ret", "exit", "mbarrier", "fence", "membar", "setmaxnreg")
WARP_WIDE = ("shfl", "vote", "redux", "activemask", "elect")
FLOATS = ("f32", "f16", "bf16", "f16x2", "bf16x2", "f64")
MATRIX = ("ldmatrix", "stmatrix")
Measure = Callable[[Array, int, Array], tuple[int, int, int]]
Note = Callable[[Array, Array], None]  # addresses and threads of those that are active
Watch = Callable[[Any], list[Callable[[], None]]]  # mask -> what to note once it has run


def class_of(instruction: Instruction) -> str:
    """Moves and reads of parameters, which machine code mostly has no instruction for, apart."""
    opcode = instruction.opcode
    name, spaces = opcode[0], space_of(opcode)
    if name in ("mma", "wgmma"):
        return "mma" if "mma_async" in opcode or name == "mma" else "control"
    if name in MATRIX:
        return "matrix"
    if name in ("mov", "cvta") or spaces == "param":
        return "move"
    if name in ("ld", "st", "cp", "atom", "red", "prefetch"):
        if name == "cp" and opcode[2] in ("commit_group", "wait_group", "wait_all"):
            return "control"
        return "shared" if spaces in SHARED_SPACES and name != "cp" else "global"
    if name in SPECIAL:
        return "special"
    if name in CONTROL:
        return "control"
    if name in WARP_WIDE:
        return "warp"
    if name == "cvt":
        return "convert"
    return "float" if opcode[-1] in FLOATS else "integer"


@dataclass
class Traffic:
    """Requests of one instruction to one kind of memory."""

    requests: int = 0
    moved: int = 0  # sectors of global memory, or passes of shared memory
    least: int = 0
    bytes: int = 0  # different ones of a warp
    width: int = 0  # bytes of a thread

    def add(self, moved: int, least: int, size: int) -> None:
        self.moved += moved
        self.least += least
        self.bytes += size


@dataclass
class Counts:
    """Of all launches of a machine; lists and keys are indices of its instructions."""

    machine: Machine
    issued: list[int] = field(default_factory=list)  # by warps
    loads: dict[int, Traffic] = field(default_factory=dict)  # from global memory
    stores: dict[int, Traffic] = field(default_factory=dict)
    shared: dict[int, Traffic] = field(default_factory=dict)
    ctas: int = 0
    in_flight: tuple[int, int] = (0, 0)  # bytes a CTA has on the way: after it waited, at most

    def by_class(self) -> Counter[str]:
        result: Counter[str] = Counter()
        for instruction, count in zip(self.machine.program.instructions, self.issued, strict=True):
            result[class_of(instruction)] += count
        return result

    def source(self, index: int) -> str:
        return self.machine.program.instructions[index].source

    def worst(self, traffic: dict[int, Traffic]) -> tuple[int, Traffic] | None:
        """(instruction, its traffic) that moves most beyond what it has to; None if none does."""
        more = {i: t.moved - t.least for i, t in traffic.items() if t.moved > t.least}
        index = max(more, key=lambda i: more[i], default=None)
        return None if index is None else (index, traffic[index])


def total(traffic: dict[int, Traffic]) -> Traffic:
    whole = Traffic()
    for each in traffic.values():
        whole.requests += each.requests
        whole.add(each.moved, each.least, each.bytes)
    return whole


def sectors(address: Array, size: int, thread: Array) -> tuple[int, int, int]:
    """(sectors, the least, different bytes) of lanes that touch `size` aligned bytes each."""
    warp = thread // WARP << 56
    different = np.unique(warp | address) >> 56
    each = np.bincount(different) * size
    touched = len(np.unique(warp | address // SECTOR))
    return touched, int((-(-each // SECTOR)).sum()), int(each.sum())


def passes(address: Array, size: int, thread: Array) -> tuple[int, int, int]:
    """(passes, the least, bytes) of lanes that touch `size` bytes of shared memory each."""
    group = thread // (BANKS * WORD // max(size, WORD))
    words = (address // WORD)[:, None] + np.arange(max(size // WORD, 1))
    keys = np.unique(group[:, None].astype(np.int64) << 32 | words)
    bank = (keys >> 32) * BANKS + keys % BANKS
    most = np.bincount(bank, minlength=(int(group.max()) + 1) * BANKS).reshape(-1, BANKS).max(1)
    return int(most.sum()), int((most > 0).sum()), size * len(thread)


def counted(machine: Machine) -> Counts:
    """From now on the machine counts what it runs."""
    counts = Counts(machine, [0] * len(machine.code))
    run_cta = machine._run_cta

    def run(cta: tuple[int, ...]) -> None:
        counts.ctas += 1
        run_cta(cta)

    machine._run_cta = run  # type: ignore[method-assign]
    machine.code = [
        _counting(counts, index, closure, _watch(counts, index))
        for index, closure in enumerate(machine.code)
    ]
    return counts


def _counting(counts: Counts, index: int, closure: Closure, watch: Watch | None) -> Closure:
    threads, issued = counts.machine.threads, counts.issued

    def run(mask: Any) -> None:
        # The instruction may overwrite its own address, or find that lanes are missing.
        notes = watch(mask) if watch is not None else []
        closure(mask)
        for note in notes:
            note()
        warps = threads // WARP if mask is True else int(mask.reshape(-1, WARP).any(1).sum())
        issued[index] += warps

    return run


def _watch(counts: Counts, index: int) -> Watch | None:
    """What looks at the addresses of an instruction; None if it has none."""
    machine, ins = counts.machine, counts.machine.program.instructions[index]
    name, space = ins.opcode[0], space_of(ins.opcode)
    if name == "cp" and ins.opcode[1] == "async":
        return _watch_copy(counts, index)
    if name in MATRIX:
        place = ins.operands[1 if name == "ldmatrix" else 0]
        lanes = 8 * int(next(p for p in ins.opcode if p in ("x1", "x2", "x4"))[1])
        note = _noting(counts.shared, index, 16, passes)
        return _at(machine, ins, address_of(machine, place, wide=False), note, lanes)
    if name not in ("ld", "ldu", "st") or space in ("param", "const", "local", ""):
        return None
    loading = name != "st"
    place, values = ins.operands[::-1] if loading else ins.operands
    width = SIZES[ins.opcode[-1]] * len(elements_of(ins.opcode, values))
    if space in SHARED_SPACES:
        note = _noting(counts.shared, index, width, passes)
        return _at(machine, ins, address_of(machine, place, wide=False), note)
    note = _noting(counts.loads if loading else counts.stores, index, width, sectors)
    return _at(machine, ins, address_of(machine, place, wide=True), note)


def _watch_copy(counts: Counts, index: int) -> Watch | None:
    machine, ins = counts.machine, counts.machine.program.instructions[index]
    if ins.opcode[2] in ("wait_group", "wait_all"):
        return lambda mask: _note_flight(counts, ins)
    if ins.opcode[2] in ("commit_group", "bulk", "mbarrier"):
        return None
    width = int(ins.operands[2].text, 0)
    kept = bytes_kept(machine, ins, width)
    to = _noting(counts.shared, index, width, passes)
    source = _noting(counts.loads, index, width, sectors)
    write = _at(machine, ins, address_of(machine, ins.operands[0], wide=False), to)
    read = _at(machine, ins, address_of(machine, ins.operands[1], wide=True), source)
    return lambda mask: [*write(mask), *read((kept() > 0) & mask)]


def _note_flight(counts: Counts, ins: Instruction) -> list[Callable[[], None]]:
    """Bytes of the CTA's copies that are under way, before and after this wait."""
    keep = int(ins.operands[0].text, 0) if ins.operands else 0
    newer: Counter[bytes] = Counter()  # groups of the same threads
    left = most = 0
    for who, parts in reversed(counts.machine.groups.committed):
        size = sum(part[3].size for part in parts)
        left += size if newer[who.tobytes()] < keep else 0
        most += size
        newer[who.tobytes()] += 1
    counts.in_flight = max(counts.in_flight[0], left), max(counts.in_flight[1], most)
    return []


def _noting(traffic: dict[int, Traffic], index: int, width: int, measure: Measure) -> Note:
    def note(address: Array, thread: Array) -> None:
        here = traffic.setdefault(index, Traffic(width=width))
        here.requests += len(np.unique(thread // WARP))
        here.add(*measure(address, width, thread))

    return note


def _at(
    machine: Machine, ins: Instruction, address: Callable[[], Array], note: Note, lanes: int = WARP
) -> Watch:
    """`lanes`: the first of each warp that name an address."""
    guard, thread = machine._guard(ins), np.arange(machine.threads)
    naming = thread % WARP < lanes

    def watch(mask: Any) -> list[Callable[[], None]]:
        active = naming & mask if guard is None else naming & mask & guard()
        if not active.any():
            return []
        where = address()[active].astype(np.int64)
        return [lambda: note(where, thread[active])]

    return watch
