"""wgmma: products of a warp group (128 threads) that go on while its threads do something else.

A product takes place when its group is waited for: until then its registers keep their old
values, and nobody may write the shared memory that it reads. What it reads must have been written
before a barrier and made visible with fence.proxy.async.

Operands in shared memory are described by 64 bits (PTX ISA, "Matrix Descriptor"): address, two
strides, and a swizzle that mixes address bits 4 to 6 with bits 7 to 9. D and A in registers lie as
in mma.m16n8k16, 16 rows a warp.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault
from ptx_machine.mma import C_COLUMN, C_ROW, a_places, numbers
from ptx_machine.operands import Binders, Closure, from_bf16
from ptx_machine.parse import Instruction
from ptx_machine.shared import IN_FLIGHT, MANY, Shared
from ptx_machine.warp import need_lanes

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
GROUP = 128  # threads
SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


@dataclass
class Job:
    """A product of one warp group."""

    threads: slice
    targets: list[Array]
    keep: bool  # D is added to
    left: Array  # [64, K] if it came from registers
    right: Array  # byte addresses [K, N]
    left_places: Array | None  # byte addresses [64, K]
    kind: str
    granules: Array


class Pending:
    """Products that nobody waited for yet, by warp group."""

    def __init__(self, threads: int) -> None:
        self.count = max(threads // GROUP, 1)
        self.reset()

    def reset(self) -> None:
        self.open: list[list[Job]] = [[] for _ in range(self.count)]
        self.groups: list[list[list[Job]]] = [[] for _ in range(self.count)]

    def pending(self, threads: Array) -> bool:
        return any(self.open) or any(self.groups)


@functools.cache
def layout(
    rows: int, width: int, wide: bool, element: int, lead: int, stride: int, swizzle: int
) -> Array:
    """Byte offsets [rows, width] before swizzling; `wide`: rows lie side by side (MN-major)."""
    row, column = np.arange(rows)[:, None], np.arange(width)[None, :]
    span = SWIZZLED_BYTES[swizzle]
    if not wide:  # elements of K side by side, 8 rows `span` bytes apart
        at = column * element
        if swizzle:
            return row // 8 * stride + row % 8 * span + at
        return row // 8 * stride + row % 8 * 16 + at // 16 * lead + at % 16
    at = row * element
    if swizzle:
        return at // span * lead + at % span + column % 8 * span + column // 8 * stride
    return at // 16 * stride + at % 16 + column % 8 * 16 + column // 8 * lead


def places(descriptor: int, rows: int, width: int, wide: bool, element: int) -> Array:
    """Byte addresses [rows, width] of an operand; width is along K."""
    begin = (descriptor & 0x3FFF) << 4
    lead, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    swizzle = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Fault("a base offset in a matrix descriptor is not known")
    at = begin + layout(rows, width, wide, element, lead, stride, swizzle)
    bits = {0: 0, 1: 7, 2: 3, 3: 1}[swizzle]
    return at ^ ((at >> 7 & bits) << 4)


@BINDERS.of("wgmma")
def _wgmma(machine: Machine, ins: Instruction) -> Closure:
    if ins.opcode[1] == "mma_async":
        return _product(machine, ins)
    if ins.opcode[1] == "fence":
        return lambda mask: need_lanes(machine, mask)
    pending, most = machine.products, 0
    if ins.opcode[1] == "wait_group":
        most = int(ins.operands[0].text, 0)

    def run(mask: Any) -> None:
        for group in groups_of(machine, mask):
            if ins.opcode[1] == "commit_group":
                pending.groups[group].append(pending.open[group])
                pending.open[group] = []
            else:
                while len(pending.groups[group]) > most:
                    for job in pending.groups[group].pop(0):
                        _finish(machine.shared, job)

    return run


def groups_of(machine: Machine, mask: Any) -> list[int]:
    need_lanes(machine, mask)
    if mask is True:
        return list(range(machine.threads // GROUP))
    whole = mask.reshape(-1, GROUP)
    if (whole.any(1) & ~whole.all(1)).any():
        raise Fault("only some warps of a warp group are here")
    return [int(g) for g in np.flatnonzero(whole.all(1))]


def _product(machine: Machine, ins: Instruction) -> Closure:
    size = re.fullmatch(r"m64n(\d+)k(\d+)", ins.opcode[4])
    kind = ins.opcode[-1]
    if size is None or ins.opcode[5] != "f32" or kind not in ("f16", "bf16", "tf32"):
        raise Fault("this product is not known")
    n, k = int(size[1]), int(size[2])
    element = 4 if kind == "tf32" else 2
    registers, shared = machine.registers, machine.shared
    targets = [registers.write(part, "f32") for part in ins.operands[0].parts]
    left, right = ins.operands[1], registers.read(ins.operands[2], "u64")
    in_registers = left.kind == "vector"
    if in_registers:
        held = [registers.read(part, "b32") for part in left.parts]
        rows, columns = a_places(k, 4 // element)
    else:
        described = registers.read(left, "u64")
    keep = registers.read(ins.operands[3], "pred")
    numbers_of = [int(o.text, 0) for o in ins.operands[4:]]
    if any(sign != 1 for sign in numbers_of[:2]):
        raise Fault("a sign of wgmma is not known")
    turned = numbers_of[2:] if element == 2 else []
    turn_left = bool(turned and turned[0]) if not in_registers else False
    turn_right = bool(turned and turned[-1])

    def run(mask: Any) -> None:
        for group in groups_of(machine, mask):
            threads = slice(GROUP * group, GROUP * (group + 1))
            b = places(_one(right[threads]), n, k, turn_right, element).T
            used = [b.reshape(-1)]
            if in_registers:
                bits = np.stack([h[threads] for h in held], 1).reshape(4, 32, -1)
                a, a_at = np.empty((4, 16, k), np.float32), None
                a[:, rows, columns] = numbers(bits, kind)
                a = a.reshape(64, k)
            else:
                a = np.empty(0, np.float32)
                a_at = places(_one(described[threads]), 64, k, turn_left, element)
                used.append(a_at.reshape(-1))
            granules = np.unique(np.concatenate(used) // shared.granule)
            _begin_reading(shared, granules, GROUP * group)
            scale = keep[threads]
            job = Job(threads, targets, bool(_one(scale)), a, b, a_at, kind, granules)
            machine.products.open[group].append(job)

    return run


def _one(values: Array) -> int:
    if (values != values[0]).any():
        raise Fault("threads of a warp group give different descriptors")
    return int(values[0])


def _begin_reading(shared: Shared, granules: Array, thread: int) -> None:
    if granules[-1] * shared.granule >= shared.size:
        raise Fault(f"outside: wgmma reads byte {granules[-1] * shared.granule} of shared memory")
    shared.note_read(granules[:, None], np.full((1, 1), thread))
    shared.check_fenced(granules)
    shared.busy[granules] += 1
    shared.read_time[granules] = IN_FLIGHT


def _finish(shared: Shared, job: Job) -> None:
    left = job.left if job.left_places is None else _read(shared, job.left_places, job.kind)
    product = np.matmul(left, _read(shared, job.right, job.kind))  # [64, N]
    tiles = product.reshape(4, 16, -1, 8)
    for i, target in enumerate(job.targets):
        row, column = C_ROW[:, i % 4], C_COLUMN[:, i % 4]
        value = tiles[:, row, i // 4, column].reshape(GROUP)
        target[job.threads] = value + target[job.threads] if job.keep else value
    shared.busy[job.granules] -= 1
    done = job.granules[shared.busy[job.granules] == 0]
    shared.read_time[done] = shared.time
    shared.reader[done] = shared.read_warp[done] = MANY


def _read(shared: Shared, at: Array, kind: str) -> Array:
    if kind == "tf32":
        return (shared.typed[4][at // 4] & np.uint32(0xFFFFE000)).view(np.float32)
    bits = shared.typed[2][at // 2]
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)
