"""Pictures of kernel results: roofline, decode by context length, decode by block size.

Each is 1,200 pixels wide. They draw rows as `kernels.Result.to_json` gives them, so a saved file
can be drawn too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykvcache.plot import OKABE_ITO

Rows = Sequence[dict[str, Any]]
MARKERS = "osD^vP*X"
SIZE = (12, 6.2)


def plot_kernels(rows: Rows, folder: Path) -> list[Path]:
    """Draw what the rows allow; returns the files.

    Raises:
        ImportError: matplotlib is not installed. OSError: a file cannot be written.
    """
    drawn = []
    for name, draw in (
        ("roofline", draw_roofline),
        ("decode-by-context", draw_contexts),
        ("decode-by-block-size", draw_block_sizes),
    ):
        figure = draw(_most_threads(rows))
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path)
            drawn.append(path)
    return drawn


def _most_threads(rows: Rows) -> Rows:
    """Without `loads`, which compute nothing, and of the largest thread count."""
    most = max(row["threads"] for row in rows)
    return [r for r in rows if r["threads"] == most and not r["contender"].startswith("loads")]


def _new_figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _kind(row: dict[str, Any]) -> str:
    return f"{row['heads']} {row['dtype']}"


def _where(rows: Rows) -> str:
    row = rows[0]
    if row.get("device") == "cuda":
        return "GPU"
    return f"CPU, {row['threads']} thread" + ("s" if row["threads"] > 1 else "")


def draw_roofline(rows: Rows) -> Any:
    """GFLOP/s against FLOPs a byte of K and V, under the roofs of the same run.

    A roof is the median of its peak over the cases; one ceiling a dtype.
    """
    figure, (axes,) = _new_figure()
    decode = [row for row in rows if row["phase"] == "decode"]
    prefill = [row for row in rows if row["phase"] == "prefill"]
    xs = np.array([row["intensity"] for row in rows])
    span = np.geomspace(xs.min() / 6, xs.max() * 2, 200)
    slope = np.median([row["peak"] for row in decode]) / 1e9 if decode else None
    if slope is not None:
        top = max([r["peak"] / 1e9 for r in prefill], default=float(slope * xs.max()))
        line = span[span * slope <= top * 1.05]
        axes.plot(line, line * slope, color="black", lw=1.5)
        middle = len(line) // 2
        axes.annotate(f"read bandwidth, {slope:.1f} GB/s", (line[middle], line[middle] * slope),
                      (-10, 4), textcoords="offset points", fontsize=10, ha="right")  # fmt: skip
    for dtype in sorted({row["dtype"] for row in prefill}):
        ceiling = np.median([row["peak"] for row in prefill if row["dtype"] == dtype]) / 1e9
        axes.axhline(ceiling, color="black", lw=1.5, ls=":")
        axes.annotate(f"matrix multiply {dtype}, {ceiling:,.0f} GFLOP/s", (span[0], ceiling),
                      (2, 5), textcoords="offset points", fontsize=10)  # fmt: skip
    _points(axes, rows)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity (FLOP a byte of K and V)")
    axes.set_ylabel("achieved (GFLOP/s)")
    axes.set_title(f"Roofline, {_where(rows)}", loc="left")
    return figure


def _points(axes: Any, rows: Rows) -> None:
    """A colour a contender, a marker a shape and dtype."""
    from matplotlib.lines import Line2D

    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    colours = {c: OKABE_ITO[i % len(OKABE_ITO)] for i, c in enumerate(contenders)}
    for row in rows:
        axes.scatter(
            row["intensity"], row["gflop_per_second"], s=46, alpha=0.85,
            color=colours[row["contender"]], edgecolors="white", linewidths=0.5,
            marker=MARKERS[kinds.index(_kind(row)) % len(MARKERS)],
        )  # fmt: skip
    handles = [
        *(Line2D([], [], ls="", marker="o", color=colours[c], label=c) for c in contenders),
        *(
            Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color="#777777", label=kind)
            for i, kind in enumerate(kinds)
        ),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=10, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip


def draw_contexts(rows: Rows) -> Any:
    """GB/s of K and V in decode against context length, an axes a shape and dtype."""
    decode = [row for row in rows if row["phase"] == "decode"]
    if len({row["length"] for row in decode}) < 2 and len({r["batch"] for r in decode}) < 2:
        return None
    kinds = list(dict.fromkeys(_kind(row) for row in decode))
    figure, axes = _new_figure(len(kinds))
    contenders = list(dict.fromkeys(row["contender"] for row in decode))
    for ax, kind in zip(axes, kinds, strict=True):
        of_kind = [row for row in decode if _kind(row) == kind]
        totals = sorted({(r["batch"] * r["length"], r["batch"], r["length"]) for r in of_kind})
        places = {(batch, length): i for i, (_, batch, length) in enumerate(totals)}
        for i, name in enumerate(contenders):
            line = sorted((places[r["batch"], r["length"]], r["gb_per_second"])
                          for r in of_kind if r["contender"] == name)  # fmt: skip
            if line:
                ax.plot(*zip(*line, strict=True), color=OKABE_ITO[i % len(OKABE_ITO)],
                        marker=MARKERS[i % len(MARKERS)], label=name)  # fmt: skip
        peak = sorted((places[r["batch"], r["length"]], r["peak"] / 1e9) for r in of_kind)
        ax.plot(*zip(*peak, strict=True), color="black", ls="--", lw=1, label="peak of the run")
        labels = [f"{batch} x {length:,}" for _, batch, length in totals]
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        ax.set_title(kind, loc="left", fontsize=11)
        ax.set_ylim(bottom=0)
    figure.supxlabel("rows x context (tokens), by the tokens in the cache", fontsize=11)
    axes[0].set_ylabel("K and V read (GB/s)")
    figure.suptitle(f"Decode by context, {_where(rows)}", fontsize=13)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def draw_block_sizes(rows: Rows) -> Any:
    """Decode speed by block size, and the share of the slots that last blocks leave empty."""
    paged = [r for r in rows if r["phase"] == "decode" and r["contender"].startswith("paged")]
    sizes = sorted({_block_size(row) for row in paged})
    if len(sizes) < 2:
        return None
    figure, (speed, waste) = _two_axes()
    groups: dict[tuple[str, int, int], dict[int, float]] = {}
    for row in paged:
        key = _kind(row), row["batch"], row["length"]
        groups.setdefault(key, {})[_block_size(row)] = row["gb_per_second"]
    for i, kind in enumerate(dict.fromkeys(key[0] for key in groups)):
        whole = [f for key, f in groups.items() if key[0] == kind and len(f) == len(sizes)]
        curves = [[100 * found[s] / max(found.values()) for s in sizes] for found in whole]
        if not curves:
            continue
        middle, low, high = (np.quantile(curves, q, axis=0) for q in (0.5, 0.0, 1.0))
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        speed.plot(sizes, middle, marker=MARKERS[i % len(MARKERS)], color=colour, label=kind)
        speed.fill_between(sizes, low, high, color=colour, alpha=0.12, lw=0)
    for i, length in enumerate((100, 500, 1000, 4000)):
        lost = [100 * (s - 1) / 2 / (length + (s - 1) / 2) for s in sizes]
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        waste.plot(sizes, lost, marker=MARKERS[i], color=colour, label=f"{length:,} tokens a row")
    speed.set_ylabel("decode speed (% of the fastest block size)")
    speed.set_title(
        "Speed: median of the cases, shaded from worst to best", loc="left", fontsize=11
    )
    waste.set_ylabel("expected waste of allocated slots (%)")
    waste.set_title("Waste: (block size - 1) / 2 slots a row", loc="left", fontsize=11)
    for ax in (speed, waste):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("block size (tokens)")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=10)
    figure.suptitle(f"Block size against speed and waste, {_where(rows)}", fontsize=13)
    return figure


def _two_axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _block_size(row: dict[str, Any]) -> int:
    return int(row["contender"].split()[1])
