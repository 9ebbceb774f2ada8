"""From counts to what a GPU would spend: shares of an H100's rates at its full bandwidth.

A decode that reads K and V at the bandwidth of memory has, for each byte, a fixed number of cycles
on its processor. What it issues in them, against what the processor can, is its share; well below 1
leaves room for waiting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ptx_machine import sass
from ptx_machine.counts import Counts, counted
from ptx_machine.machine import Machine
from ptx_machine.parse import Program, parse

# Of an H100 SXM; rates are a processor's, a cycle.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.7e9, 3.35e12
BYTES_PER_CYCLE = BANDWIDTH / CLOCK / PROCESSORS
ISSUED, SPECIAL_LANES, PRODUCTS = 4, 16, 1024  # PRODUCTS: of 16-bit numbers, dense
# F2F goes where special functions go.
SLOW = ("MUFU", "F2F", "F2I", "I2F")
REGISTERS, SHARED_BYTES, SHARED_RESERVED, THREADS, CTAS = 65536, 228 * 1024, 1024, 2048, 32
WARP = 32


@dataclass
class Compiled:
    """A kernel as ptxas makes it."""

    registers: int
    spilled: int
    hot: sass.Pass | None

    def resident(self, threads: int, shared: int) -> int:
        """CTAs of a processor."""
        each = -(-self.registers * WARP // 256) * 256 * (threads // WARP)
        by_shared = SHARED_BYTES // (shared + SHARED_RESERVED)
        return min(REGISTERS // each, by_shared, THREADS // threads, CTAS)


@dataclass
class Cycles:
    """That a pass takes on a processor if nothing else limits it."""

    memory: float  # at full bandwidth; 0 if the pass copies nothing
    issue: float
    special: float
    products: float


def cycles(hot: sass.Pass) -> Cycles:
    slow = sum(n for name, n in hot.opcodes.items() if name.split(".")[0] in SLOW)
    products = sum(n for name, n in hot.opcodes.items() if name.startswith("HMMA.16816"))
    return Cycles(
        hot.copied_bytes / BYTES_PER_CYCLE,
        hot.issued / ISSUED,
        slow * WARP / SPECIAL_LANES,
        products * 16 * 8 * 16 / PRODUCTS,
    )


def compiled(text: str, entry: str, ptxas: str, nvdisasm: str | None) -> Compiled:
    """`entry` of a module of PTX, through ptxas."""
    arch = re.search(r"\.target\s+(\w+)", text)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(text)
        command = [ptxas, f"-arch={arch[1]}", "-v", f"--entry={entry}", str(ptx), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas on {entry}: {done.stdout}{done.stderr}")
        report = done.stderr
        registers = int(re.findall(r"Used (\d+) registers", report)[-1])
        spilled = int(re.findall(r"(\d+) bytes spill stores", report)[-1])
        hot = None
        if nvdisasm is not None:
            code = sass.functions(sass.disassemble(nvdisasm, cubin))[entry]
            with suppress(ValueError):  # of a kernel without products
                hot = sass.hot_pass(code)
    return Compiled(registers, spilled, hot)


@dataclass
class Run:
    """A machine that a driver made while it was noted."""

    name: str  # in the PTX
    text: str
    counts: Counts


@contextmanager
def noted(driver: Any, forget: Callable[[], object]) -> Iterator[list[Run]]:
    """Machines that `driver` makes count; `forget` makes it forget those that it has."""
    runs: list[Run] = []
    texts: dict[int, str] = {}

    def parsed(text: str, kernel: str | None = None) -> Program:
        program = parse(text, kernel)
        texts[id(program)] = text
        return program

    def made(program: Program, threads: int, shared_bytes: int = 0) -> Machine:
        machine = Machine(program, threads, shared_bytes)
        runs.append(Run(program.name, texts[id(program)], counted(machine)))
        return machine

    forget()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "parse", parsed))
        stack.enter_context(mock.patch.object(driver, "Machine", made))
        try:
            yield runs
        finally:
            forget()
