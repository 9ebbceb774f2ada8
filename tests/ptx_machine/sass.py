"""The hot loop of a kernel's machine code: what one pass of it issues.

A loop of these kernels branches around what a call does not use (masks, scales, rescaling). Of the
innermost loop that multiplies, the pass that is counted is the one that copies and multiplies most,
and of those the shortest: what a full tile takes when the softmax maximum does not move. Reads what
nvdisasm prints.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
TARGET = re.compile(r"\((\.L_x_\d+)\)")
WARP = 32
# By the first part of an opcode; what is not here is "integer".
CLASSES = {
    "mma": "HMMA IMMA QGMMA HGMMA WARPGROUP",
    "matrix": "LDSM STSM MOVM",
    "shared": "LDS STS ATOMS",
    "global": "LDG STG LDGSTS UTMALDG ATOM ATOMG RED LDGDEPBAR LD ST",
    "special": "MUFU",
    "convert": "F2FP F2F F2I I2F HADD2 I2FP F2IP",
    "float": "FADD FMUL FFMA FMNMX FSETP FSEL HMUL2 HFMA2 HSETP2 FCHK",
    "warp": "SHFL VOTE REDUX",
    "control": "BRA BSSY BSYNC WARPSYNC BAR NOP EXIT DEPBAR SYNCS CALL RET ELECT ERRBAR",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


@dataclass(frozen=True)
class Code:
    """One instruction of the machine."""

    opcode: str
    guarded: bool
    operands: str

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.opcode.partition(".")[0], "integer")

    @property
    def copied_bytes(self) -> int:
        """From global to shared memory, by a warp that copies in full."""
        parts = self.opcode.split(".")
        if parts[0] != "LDGSTS":
            return 0
        return WARP * next((int(p) // 8 for p in parts if p in ("64", "128")), 4)

    @property
    def weight(self) -> int:
        """Of wide copies and products, which every pass for a full tile has."""
        return int(self.copied_bytes > 4 * WARP) + int(self.kind == "mma")


@dataclass
class Pass:
    """What a warp issues in one pass of a loop."""

    counts: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    copied_bytes: int = 0

    @property
    def issued(self) -> int:
        return sum(self.counts.values())


def disassemble(nvdisasm: str | Path, cubin: Path) -> str:
    command = [str(nvdisasm), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, str]:
    """Code by mangled name."""
    parts = re.split(r"^\.text\.([\w$]+):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def hot_pass(text: str) -> Pass:
    """Of the innermost loop that multiplies."""
    codes, labels = _read(text)
    loops = []
    for end, code in enumerate(codes):
        begin = _target(code, labels)
        if begin is None or begin > end:
            continue
        if any(code.kind == "mma" for code in codes[begin : end + 1]):
            loops.append((end - begin, begin, end))
    if not loops:
        raise ValueError("no loop multiplies")
    _, begin, end = min(loops)
    return _shortest(codes, labels, begin, end)


def _read(text: str) -> tuple[list[Code], dict[str, int]]:
    codes: list[Code] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(codes)
        elif found := LINE.search(line):
            codes.append(Code(found[4], found[3] is not None, found[5]))
    return codes, labels


def _target(code: Code, labels: dict[str, int]) -> int | None:
    """Where a branch goes; those of warps that fell apart do not count."""
    if not code.opcode.startswith("BRA") or code.opcode.startswith("BRA.DIV"):
        return None
    found = TARGET.search(code.operands)
    return labels.get(found[1]) if found else None


def _shortest(codes: list[Code], labels: dict[str, int], begin: int, end: int) -> Pass:
    """Every pass goes forward, so the best way to an instruction is known when it is reached."""
    best: dict[int, tuple[int, int, int]] = {begin: (0, 0, -1)}  # -weight, length, from
    for i in range(begin, end + 1):
        if i not in best:
            continue
        code, (weight, length, _) = codes[i], best[i]
        target = _target(code, labels)
        conditional = code.guarded or ("P" in code.operands.split("`")[0])
        nexts = [i + 1] if target is None or conditional else []
        nexts += [target] if target is not None else []
        for following in nexts:
            reached = (weight - code.weight, length + 1, i)
            inside = i < following <= end
            if inside and reached[:2] < best.get(following, (1, 0, 0))[:2]:
                best[following] = reached
    if end not in best:
        raise ValueError("the end of the loop cannot be reached")
    result, i = Pass(), end
    while i >= 0:
        code = codes[i]
        result.counts[code.kind] += 1
        result.opcodes[code.opcode] += 1
        result.copied_bytes += code.copied_bytes if code.weight else 0
        i = best[i][2]
    return result
