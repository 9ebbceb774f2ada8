"""A picture of a pool: every block as a cell, coloured by the sequence that holds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pykvcache.allocator import BlockAllocator

FREE = -1
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
FREE_COLOUR = "#ECECEC"
MAX_CELLS = 1 << 16


def block_owners(
    allocator: BlockAllocator, seqs: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First row that holds each block (FREE = none) and how many do: two int64 [num_blocks]."""
    owners = np.full(allocator.num_blocks, FREE, np.int64)
    holders = np.zeros(allocator.num_blocks, np.int64)
    for group in range(allocator.groups):
        for row, blocks in enumerate(allocator.block_table(seqs, group)):
            held = blocks[blocks >= 0]
            owners[held] = np.where(holders[held] == 0, row, owners[held])
            holders[held] += 1
    return owners, holders


def plot_blocks(allocator: BlockAllocator, seqs: Sequence[int], path: str | Path) -> None:
    """Draw the pool as a grid of blocks, 1,200 pixels wide, and save it (format by suffix).

    A block has the colour of the first sequence that holds it, and a dot when others share it.
    Blocks that only sequences outside `seqs` hold count as free. Pools above 65,536 blocks are cut.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.artist import Artist
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install pykvcache[plot]") from error
    owners, holders = (part[:MAX_CELLS] for part in block_owners(allocator, seqs))
    rows = len(seqs)
    palette: tuple[str, ...] = OKABE_ITO
    if rows > len(palette):
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.95, rows))
        palette = tuple(matplotlib.colors.to_hex(shade) for shade in shades)
    columns = min(len(owners), max(16, 8 * math.ceil(math.sqrt(len(owners)) / 4)))
    lines = math.ceil(len(owners) / columns)
    colours = np.ones((lines * columns, 3))
    table = np.array([to_rgb(c) for c in (*palette[:rows], FREE_COLOUR)])
    colours[: len(owners)] = table[owners]

    height = 1.4 + 10.0 * min(lines / columns, 1.0)
    figure = Figure(figsize=(12, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(colours.reshape(lines, columns, 3), aspect="equal", interpolation="nearest")
    shared = np.flatnonzero(holders > 1)
    dot = min(60.0, (240 / columns) ** 2)
    axes.scatter(shared % columns, shared // columns, s=dot, c="black", edgecolors="white")
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, lines), minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.0, 40 / columns))
    axes.tick_params(which="minor", length=0)
    ticks = np.unique(np.linspace(0, lines - 1, min(lines, 9)).astype(int))
    axes.set_yticks(ticks, [str(line * columns) for line in ticks])
    axes.set_xlabel("block id within the line")
    axes.set_ylabel("block id of the line's start")
    used = int((owners != FREE).sum())
    axes.set_title(
        f"{used} of {allocator.num_blocks} blocks in use, {len(shared)} shared; "
        f"{allocator.block_size} tokens a block, {rows} sequences"
    )
    shown = range(rows) if rows <= 10 else [0, rows // 2, rows - 1]
    legend: list[Artist] = [Patch(color=palette[row], label=f"sequence {row}") for row in shown]
    legend.append(Line2D([], [], color="black", marker="o", linestyle="", label="shared"))
    legend.append(Patch(facecolor=FREE_COLOUR, edgecolor="#999999", label="free"))
    axes.legend(handles=legend, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path)
