"""Compares two files of results: what got slower, what got faster, and whether one may say so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

IDENTITY = (
    *("device", "phase", "heads", "dtype", "batch", "length", "workload", "where", "operation"),
    *("mixed", "num_blocks", "block_size", "rows", "budget_tokens", "threads", "contender"),
)
# Files that do not say these are of the CPU and of the defaults.
UNSAID = ("device=cpu", "num_blocks=1000000", "block_size=16")
OVERHEAD_PARTS = ("plan", "settle", "rest", "step")  # microseconds
SAME_DEVICE = ("cpu", "cpu_isa", "gpus", "threads")
NOTICED = 1.1


@dataclass(frozen=True)
class Time:
    """Seconds of one thing that was measured; the spread is median where none was saved."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, found: dict[str, Any], scale: float = 1.0) -> Time:
        """Raises ValueError unless it has a median, and every figure is above 0."""
        median = found.get("median")
        figures: list[Any] = [median, found.get("p10", median), found.get("p90", median)]
        for figure in figures:
            if type(figure) not in (int, float) or not 0 < figure < math.inf:
                raise ValueError(f"a time must be a number above 0, got {figure!r:.40}")
        return cls(*(scale * figure for figure in figures))


@dataclass(frozen=True)
class Change:
    """One thing in both files; ratio: new time over old, above 1 is slower."""

    name: str
    old: Time
    new: Time

    @property
    def ratio(self) -> float:
        return self.new.median / self.old.median

    @property
    def verdict(self) -> str:
        """Slower or faster by more than NOTICED, and whether the spreads overlap."""
        if 1 / NOTICED <= self.ratio <= NOTICED:
            return ""
        word = "slower" if self.ratio > 1 else "faster"
        apart = self.new.p10 > self.old.p90 or self.new.p90 < self.old.p10
        return word if apart else f"{word}, spreads overlap"


@dataclass(frozen=True)
class Comparison:
    """Of an old file with new results. warnings: devices differ. gone, added: names."""

    changes: Sequence[Change]
    warnings: Sequence[str]
    gone: Sequence[str]
    added: Sequence[str]

    @property
    def worst(self) -> float:
        return max((change.ratio for change in self.changes), default=0.0)


def read_results(path: str | Path) -> dict[str, Any]:
    """A file that a benchmark saved.

    Raises:
        ValueError: one line; it cannot be read or is something else.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or not {"environment", "results"} <= set(found):
        raise ValueError(f"{path} must have environment and results, as --json saves them")
    if not isinstance(found["environment"], dict):
        raise ValueError(f"{path}: environment must be an object")
    try:
        times = list(times_of(found["results"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not times:
        raise ValueError(f"{path} has no times to compare")
    return found


def times_of(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Time]]:
    """Everything in the rows that has a median, by name.

    Raises:
        ValueError: rows are no list of objects, or a time is no number above 0.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"results must be a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        try:
            yield from _times_of(row)
        except ValueError as error:
            raise ValueError(f"results, row {number}: {error}") from None


def _times_of(row: object) -> Iterator[tuple[str, Time]]:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {type(row).__name__}")
    words = [f"{key}={row[key]}" for key in IDENTITY if row.get(key) is not None]
    name = " ".join(word for word in words if word not in UNSAID)
    if "median" in row:
        yield name, Time.of(row)
    if row.get("timing") is not None:
        yield name, Time.of(_object("timing", row["timing"]))
    for part, timing in _object("timings", row.get("timings") or {}).items():
        yield f"{name} {part}".strip(), Time.of(_object(part, timing))
    if all(part in row for part in OVERHEAD_PARTS):
        for part in OVERHEAD_PARTS:
            if row[part] != 0:  # a difference of clocks may be
                yield f"{name} {part}", Time.of({"median": row[part]}, 1e-6)


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {type(value).__name__}")
    return value


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Match two {"environment", "results"} by what was measured."""
    before, after = dict(times_of(old["results"])), dict(times_of(new["results"]))
    both = [name for name in after if name in before]
    warnings = []
    for key in SAME_DEVICE:
        mine, theirs = new["environment"].get(key), old["environment"].get(key)
        if mine != theirs:
            warnings.append(f"{key} was {theirs!r} and is {mine!r}")
    return Comparison(
        [Change(name, before[name], after[name]) for name in both],
        warnings,
        [name for name in before if name not in after],
        [name for name in after if name not in before],
    )


def change_table(found: Comparison) -> Table:
    """Slowest first."""
    table = Table(title="against the old file", title_justify="left", box=None, pad_edge=False)
    table.add_column("measured")
    for column in ("old", "new", "new / old"):
        table.add_column(column, justify="right")
    table.add_column("")
    for change in sorted(found.changes, key=lambda c: -c.ratio):
        times = (duration(change.old.median), duration(change.new.median))
        table.add_row(change.name, *times, f"{change.ratio:.2f}", change.verdict)
    return table


def duration(seconds: float | None) -> str:
    """Three digits and a unit: 4.35 us."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
