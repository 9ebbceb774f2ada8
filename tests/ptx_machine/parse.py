"""Text of a PTX module -> the instructions of one of its kernels.

Only what compilers write is understood: no macros, no device functions. Scopes `{ ... }`, which
inline assembly opens, get names of their own for what they declare.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
NAME = re.compile(r"[%$A-Za-z_][\w$.]*$")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
VARIABLE = re.compile(
    r"\.(shared|const|global|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)"
    r"(?:\s*=\s*\{([^}]*)\})?\s*;"
)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr\S*(?:\s+\.(?:global|align|shared)\s*\d*)*)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?"
)
SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


@dataclass(frozen=True)
class Operand:
    """kind: "register", "number", "name" (special register, symbol, label), "vector" (parts),
    "address" (parts[0] plus `offset`), "pair" (two predicates), "sink"."""

    kind: str
    text: str
    parts: tuple[Operand, ...] = ()
    offset: int = 0
    negated: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line; `opcode` is split at the dots, `source` is where `.loc` says it comes from."""

    line: int
    text: str
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Operand | None
    source: str


@dataclass(frozen=True)
class Variable:
    """A declared array of shared, constant, global or local memory."""

    space: str
    name: str
    size: int  # bytes; 0: as many as the launch says
    align: int
    values: tuple[int, ...] = ()
    kind: str = "b8"


@dataclass
class Program:
    """A kernel."""

    name: str
    parameters: list[tuple[str, str, int]]  # name, type, bytes
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name or prefix<count> -> type
    variables: list[Variable] = field(default_factory=list)
    threads: int = 0  # .reqntid, 0 if not given


def parse(text: str, kernel: str | None = None) -> Program:
    """The kernel called `kernel`, or the only one."""
    bare = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL)
    bare = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), bare)
    entries = [m for m in ENTRY.finditer(bare) if kernel in (None, m[1])]
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} kernels of the module match {kernel!r}")
    entry = entries[0]
    parameters = [
        (name, kind, int(count or 1) * SIZES[kind])
        for kind, name, count in PARAMETER.findall(entry[2])
    ]
    program = Program(entry[1], parameters)
    if required := re.search(r"\.reqntid\s+(\d+)", entry[3]):
        program.threads = int(required[1])
    first = re.search(r"\.entry\b", bare)
    outside = bare[: first.start()] if first else ""
    program.variables += [_variable(match) for match in VARIABLE.finditer(outside)]
    _Body(text, bare, entry.end(), program).read()
    return program


def _variable(match: re.Match[str]) -> Variable:
    space, align, kind, name, shape, values = match.groups()
    count = 1
    for size in re.findall(r"\[(\d*)\]", shape):
        count *= int(size or 0)
    numbers = tuple(int(v, 0) for v in values.split(",")) if values else ()
    return Variable(space, name, count * SIZES[kind], int(align or 1), numbers, kind)


class _Body:
    """Reads statements from the opening brace of a kernel to its closing one."""

    def __init__(self, text: str, bare: str, begin: int, program: Program) -> None:
        self.bare, self.at, self.program = bare, begin, program
        self.line_starts = [m.start() + 1 for m in re.finditer("\n", text)]
        self.files = {
            number: path.rsplit("/", 1)[-1]
            for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)
        }
        self.scopes: list[dict[str, str]] = [{}]
        self.source, self.scope_count = "", 0
        self.prefixes: set[str] = set()  # of registers that are counted

    def read(self) -> None:
        for kind, text, at in self._statements():
            if kind == "{":
                self.scope_count += 1
                self.scopes.append({})
            elif kind == "}":
                self.scopes.pop()
            elif kind == "label":
                self.program.labels[self._declare(text)] = len(self.program.instructions)
            elif text.startswith("."):
                self._directive(text)
            else:
                self.program.instructions.append(self._instruction(text, at))

    def _statements(self) -> Iterator[tuple[str, str, int]]:
        bare, depth = self.bare, 1
        while depth:
            while bare[self.at].isspace():
                self.at += 1
            at = self.at
            if bare[at] in "{}":
                depth += 1 if bare[at] == "{" else -1
                self.at += 1
                if depth:
                    yield bare[at], "", at
            elif label := LABEL.match(bare, at):
                self.at = label.end()
                yield "label", label[1], at
            elif bare.startswith((".loc", ".file"), at):
                self.at = bare.index("\n", at)
                yield "directive", bare[at : self.at], at
            else:
                self.at = bare.index(";", at) + 1
                yield "statement", bare[at : self.at - 1], at

    def _declare(self, name: str) -> str:
        if len(self.scopes) == 1:
            return name
        inner = f"{name}@{self.scope_count}"
        self.scopes[-1][name] = inner
        return inner

    def _directive(self, text: str) -> None:
        if text.startswith(".loc"):
            file, line = text.split()[1:3]
            self.source = f"{self.files.get(file, file)}:{line}"
        elif text.startswith(".reg"):
            kind, names = text.removeprefix(".reg").strip().removeprefix(".").split(None, 1)
            for name in map(str.strip, names.split(",")):
                counted = re.fullmatch(r"(.*)<(\d+)>", name)
                inner = counted is not None and len(self.scopes) > 1
                each = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if inner else [name]
                self.program.registers |= {self._declare(one): kind for one in each}
                if counted and not inner:
                    self.prefixes.add(counted[1])
        elif match := VARIABLE.match(text + ";"):
            self.program.variables.append(_variable(match))

    def _instruction(self, text: str, at: int) -> Instruction:
        text = " ".join(text.split())
        predicate, rest = None, text
        if text.startswith("@"):
            guard, rest = text[1:].split(None, 1)
            predicate = self._operand(guard)
        opcode, _, operands = rest.partition(" ")
        return Instruction(
            line=bisect_right(self.line_starts, at) + 1,
            text=text,
            opcode=tuple(opcode.split(".")),
            operands=tuple(self._operand(part) for part in split(operands)),
            predicate=predicate,
            source=self.source,
        )

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{":
            parts = tuple(self._operand(part) for part in split(text[1:-1]))
            return Operand("vector", text, parts)
        if text[0] == "[":
            inner, *rest = split(text[1:-1])  # after a comma: coordinates
            base, offset = _address(inner)
            parts = (self._operand(base), *(self._operand(part) for part in rest))
            return Operand("address", text, parts, offset)
        if "|" in text:
            return Operand("pair", text, tuple(self._operand(p) for p in text.split("|")))
        if text[0] == "!":
            return Operand("register", self._resolve(text[1:]), negated=True)
        if text == "_":
            return Operand("sink", text)
        if text[0] in "-0123456789":
            return Operand("number", text)
        if not NAME.match(text):
            raise ValueError(f"operand {text!r} is not understood")
        name = self._resolve(text)
        known = name in self.program.registers or name.rstrip("0123456789") in self.prefixes
        return Operand("register" if known else "name", name)

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)


def split(text: str) -> list[str]:
    """At commas that are in no bracket."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _address(text: str) -> tuple[str, int]:
    base, sign, offset = re.fullmatch(r"\s*([%$\w]+)\s*(?:([+-])\s*(-?\w+))?\s*", text).groups()  # type: ignore[union-attr]
    value = int(offset, 0) if offset else 0
    return base, -value if sign == "-" else value
