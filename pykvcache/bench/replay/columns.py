"""Tables as wide as the terminal: columns that do not fit go into a second table, none is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from rich.table import Table

Column: TypeAlias = "tuple[str, Sequence[str]]"
"""A heading and a cell a line."""
GAP = 2  # rich's own, between two columns
LEAST = 8  # characters of a label before it is folded


def tables(
    labels: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Column]]],
    width: int,
    title: str | None = None,
) -> list[Table]:
    """All columns beside the labels if `width` allows it, else a table or more for each group.

    groups: the heading of the labels, and columns; of one table, the first heading.
    """
    first = groups[0][0], labels
    everything = [column for _, columns in groups for column in columns]
    if widest(first) + sum(GAP + widest(column) for column in everything) <= width:
        return [_table(first, everything, width, title)]
    found: list[Table] = []
    for heading, columns in groups:
        for part in _split((heading, labels), columns, width):
            found.append(_table((heading, labels), part, width, None if found else title))
    return found


def widest(column: Column) -> int:
    """Characters of its longest line."""
    return max(map(len, (column[0], *column[1])))


def _split(labels: Column, columns: Sequence[Column], width: int) -> list[list[Column]]:
    parts: list[list[Column]] = []
    left = 0
    for column in columns:
        left -= GAP + widest(column)
        if left < 0:
            parts.append([])
            left = width - widest(labels) - GAP - widest(column)
        parts[-1].append(column)
    return parts


def _table(labels: Column, columns: Sequence[Column], width: int, title: str | None) -> Table:
    """Labels are folded first, and figures only where not even one has room."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    room = width - sum(GAP + widest(column) for column in columns)
    table.add_column(labels[0], overflow="fold", max_width=max(room, LEAST))
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=room >= LEAST, overflow="fold")
    for cells in zip(labels[1], *(column[1] for column in columns), strict=True):
        table.add_row(*cells)
    return table
