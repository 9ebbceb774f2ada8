"""mbarrier, boxes of the tensor memory accelerator (cp.async.bulk.tensor), setmaxnreg.

A box arrives when somebody waits for its barrier, so that what does not wait finds nothing there.
A map is the one of tests/cuda_host/boxes.h, which has the size of the driver's; boxes have four
dimensions, elements of 2 bytes and a swizzle of 128 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.data import address_of
from ptx_machine.fault import Fault, Stalled
from ptx_machine.operands import Binders, Closure, put
from ptx_machine.parse import Instruction
from ptx_machine.shared import IN_FLIGHT

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()
MAP_BYTES, MAP_FORMAT = 128, "<Q4q4q4i"  # address, sizes, strides in bytes, box
SWIZZLED_ROW = 128


@dataclass
class Barrier:
    """Arrivals and bytes that its phase still waits for."""

    count: int
    arrivals: int
    missing_bytes: int = 0
    phase: int = 0


@dataclass
class Box:
    """A copy that has not arrived: where to, and the address of each element, 0 for a zero."""

    barrier: int
    granules: Array
    thread: int
    to: Array  # byte addresses of 2-byte elements
    source: Array  # uint64


class Barriers:
    """Those of a CTA by their address, and boxes that are on their way."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.known: dict[int, Barrier] = {}
        self.boxes: list[Box] = []

    def at(self, address: int) -> Barrier:
        if address not in self.known:
            raise Fault(f"no mbarrier was initialised at {address}")
        return self.known[address]

    def change(self, machine: Machine, address: int, arrivals: int, missing: int) -> None:
        """Arrivals come, bytes are expected (or, negative, have come)."""
        barrier = self.at(address)
        barrier.missing_bytes += missing
        barrier.arrivals -= arrivals
        if barrier.arrivals < 0:
            raise Fault("more arrivals at an mbarrier than it was initialised for")
        if barrier.arrivals == 0 and barrier.missing_bytes == 0:
            barrier.phase ^= 1
            barrier.arrivals = barrier.count
            machine.stalled[:] = False

    def land(self, machine: Machine, address: int) -> None:
        """Boxes of this barrier arrive."""
        coming = [box for box in self.boxes if box.barrier == address]
        self.boxes = [box for box in self.boxes if box.barrier != address]
        shared = machine.shared
        for box in coming:
            inside = box.source != 0
            values = np.zeros(len(box.source), np.uint16)
            if inside.any():
                values[inside] = machine.memory.load(box.source[inside], np.uint16, 1, True)[0]
            shared.typed[2][box.to // 2] = values
            shared.written[box.granules] = shared.time
            shared.writer[box.granules] = box.thread
            shared.write_sync[box.granules] = shared.sync[box.thread]
            shared.unfenced[box.granules] = -1  # it came through the proxy that wgmma reads with
            self.change(machine, address, 0, -2 * len(box.to))


@BINDERS.of("mbarrier")
def _barrier(machine: Machine, ins: Instruction) -> Closure:
    barriers, what = machine.barriers, ins.opcode[1]
    if what == "try_wait":
        return _wait(machine, ins)
    returned = what == "arrive"
    address = address_of(machine, ins.operands[1 if returned else 0], wide=False)
    number = None
    if len(ins.operands) > 1 + returned:
        number = machine.registers.read(ins.operands[1 + returned], "u32")
    expects = "expect_tx" in ins.opcode
    if what not in ("init", "arrive") or (returned and ins.operands[0].kind != "sink"):
        raise Fault("this use of an mbarrier is not known")

    def run(mask: Any) -> None:
        where = address()
        for thread in np.flatnonzero(np.broadcast_to(mask, where.shape)):
            at, value = int(where[thread]), 0 if number is None else int(number[thread])
            if what == "init":
                barriers.known[at] = Barrier(value, value)
            else:
                barriers.change(machine, at, 1, value if expects else 0)

    return run


def _wait(machine: Machine, ins: Instruction) -> Closure:
    """Until the phase of that parity has ended: the instruction may wait, so here it does."""
    if "parity" not in ins.opcode:
        raise Fault("only waiting for a parity is known")
    barriers = machine.barriers
    target = machine.registers.write(ins.operands[0], "pred")
    address = address_of(machine, ins.operands[1], wide=False)
    parity = machine.registers.read(ins.operands[2], "u32")

    def run(mask: Any) -> None:
        where, active = address(), np.broadcast_to(mask, machine.threads)
        late = np.zeros(machine.threads, np.bool_)
        for at in np.unique(where[active]):
            here = active & (where == at)
            barrier = barriers.at(int(at))
            if (barrier.phase == parity[here]).any():
                barriers.land(machine, int(at))
            late |= here & (barrier.phase == parity)
        if late.any():
            raise Stalled(late)
        put(target, np.True_, mask)

    return run


def copy_box(machine: Machine, ins: Instruction) -> Closure:
    """cp.async.bulk.tensor.4d of a box, by each thread that is here."""
    if ins.opcode[3:5] != ("tensor", "4d") or "tile" not in ins.opcode:
        raise Fault("only boxes of four dimensions are known")
    registers, shared, barriers = machine.registers, machine.shared, machine.barriers
    target = address_of(machine, ins.operands[0], wide=False)
    described = address_of(machine, ins.operands[1], wide=True)
    corner = [registers.read(part, "s32") for part in ins.operands[1].parts[1].parts]
    barrier = address_of(machine, ins.operands[2], wide=False)

    def run(mask: Any) -> None:
        to, maps, at = target(), described(), barrier()
        for thread in np.flatnonzero(np.broadcast_to(mask, to.shape)):
            begin, found = int(to[thread]), int(maps[thread])
            if begin % SWIZZLED_ROW:
                raise Fault(f"a box must begin at a multiple of {SWIZZLED_ROW}, not at {begin}")
            if found % 64 or found + MAP_BYTES > len(machine.parameter_bytes):
                raise Fault(f"there is no tensor map at byte {found} of the parameters")
            source = _elements(machine.parameter_bytes, found, [int(c[thread]) for c in corner])
            places = begin + 2 * np.arange(len(source))
            if places[-1] >= shared.size:
                raise Fault(f"outside: a box ends at {places[-1] + 2} of {shared.size} bytes")
            places ^= (places >> 7 & 7) << 4
            granules = np.unique(places // shared.granule)[:, None]
            shared.check_write(granules, np.full((1, 1), thread))
            shared.written[granules] = IN_FLIGHT
            shared.writer[granules] = thread
            barriers.boxes.append(Box(int(at[thread]), granules, int(thread), places, source))

    return run


def _elements(parameters: Array, at: int, corner: list[int]) -> Array:
    """Addresses of a box's elements, the innermost dimension first; 0 where it is outside."""
    size = struct.calcsize(MAP_FORMAT)
    numbers = struct.unpack(MAP_FORMAT, parameters[at : at + size].tobytes())
    address, sizes, strides, box = numbers[0], numbers[1:5], numbers[5:9], numbers[9:13]
    offset, inside = np.zeros(1, np.int64), np.ones(1, np.bool_)
    for begin, limit, stride, count in zip(corner, sizes, strides, box, strict=True):
        index = begin + np.arange(count)
        offset = (offset[None, :] + (index * stride)[:, None]).reshape(-1)
        valid = (index >= 0) & (index < limit)
        inside = (inside[None, :] & valid[:, None]).reshape(-1)
    return np.where(inside, np.uint64(address) + offset.astype(np.uint64), np.uint64(0))


@BINDERS.of("setmaxnreg")
def _registers(machine: Machine, ins: Instruction) -> Closure:
    """How many registers a thread may use is ptxas' business."""
    return lambda mask: None
