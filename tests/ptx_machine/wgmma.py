"""wgmma: products of a warp group that read shared memory while the threads go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ptx_machine.fault import Fault
from ptx_machine.operands import Binders, Closure
from ptx_machine.parse import Instruction

if TYPE_CHECKING:
    from ptx_machine.machine import Machine

Array = NDArray[Any]
BINDERS = Binders()


class Pending:
    """Products that nobody waited for yet."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.reset()

    def reset(self) -> None:
        self.groups: list[Any] = []

    def pending(self, threads: Array) -> bool:
        return bool(self.groups)


@BINDERS.of("wgmma")
def _wgmma(machine: Machine, ins: Instruction) -> Closure:
    def run(mask: Any) -> None:
        raise Fault("wgmma is not known")

    return run
