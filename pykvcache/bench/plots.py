"""Pictures of kernel results: roofline, decode by context length, decode by block size.

Each is 1,200 pixels wide. They draw rows as `kernels.Result.to_json` gives them, so a saved file
can be drawn too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pykvcache.plot import OKABE_ITO

Rows = Sequence[dict[str, Any]]
PAGED = r"paged \d+"  # of the first backend
MARKERS = "osD^v<>p"
LINES = ("-", "--", ":", "-.")
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
    """Without `loads` and plans, which are no attention, and of the largest thread count."""
    most = max(row["threads"] for row in rows)
    others = ("loads", "plan")
    return [r for r in rows if r["threads"] == most and not r["contender"].startswith(others)]


def _new_figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=100, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _kind(row: dict[str, Any]) -> str:
    return f"{row['heads']} {row['dtype']}"


@dataclass(frozen=True)
class Look:
    """Of one contender: no two of 28 look the same.

    Colours repeat after len(OKABE_ITO), then with hollow points, black rims and grey points.
    """

    colour: str
    face: str
    rim: str
    line: str
    marker: str

    @classmethod
    def of(cls, number: int) -> Look:
        again = number // len(OKABE_ITO) % len(LINES)
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        face = (colour, "white", colour, "#CCCCCC")[again]
        rim = ("white", colour, "black", colour)[again]
        return cls(colour, face, rim, LINES[again], MARKERS[(number + again) % len(MARKERS)])

    def points(self) -> dict[str, Any]:
        """For the points of a line or a legend."""
        return {"color": self.colour, "mfc": self.face, "mec": self.rim, "ms": 7}


def looks_of(rows: Rows) -> dict[str, Look]:
    """The look of every contender, the same in all pictures of these rows."""
    names = dict.fromkeys(row["contender"] for row in rows)
    return {name: Look.of(number) for number, name in enumerate(names)}


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
    span = np.geomspace(xs.min() / 12, xs.max() * 2, 200)  # room for a label before the points
    slope = np.median([row["peak"] for row in decode]) / 1e9 if decode else None
    if slope is not None:
        top = max([r["peak"] / 1e9 for r in prefill], default=float(slope * xs.max()))
        line = span[span * slope <= top * 1.05]
        axes.plot(line, line * slope, color="black", lw=1.5)
        axes.annotate(f"read bandwidth, {slope:.1f} GB/s", (line[0], line[0] * slope),
                      (10, -5), textcoords="offset points", fontsize=10)  # fmt: skip
    for dtype in sorted({row["dtype"] for row in prefill}):
        ceiling = np.median([row["peak"] for row in prefill if row["dtype"] == dtype]) / 1e9
        axes.axhline(ceiling, color="black", lw=1.5, ls=":")
        axes.annotate(f"matrix multiply {dtype}, {ceiling:,.0f} GFLOP/s", (span[0], ceiling),
                      (2, 5), textcoords="offset points", fontsize=10)  # fmt: skip
    _points(axes, rows)
    axes.set_xscale("log")
    axes.set_yscale("log")
    use_plain_numbers(axes.xaxis)
    use_plain_numbers(axes.yaxis)
    axes.set_xlabel("arithmetic intensity (FLOP a byte of K and V)")
    axes.set_ylabel("achieved (GFLOP/s)")
    axes.set_title(f"Roofline, {_where(rows)}", loc="left")
    return figure


def use_plain_numbers(axis: Any, few: bool = False) -> None:
    """Label a logarithmic axis 0.5, 1, 2, 5, 10 (few: 1, 10, 100) instead of by powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, (1,) if few else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _points(axes: Any, rows: Rows) -> None:
    """A colour a contender, a marker a shape and dtype."""
    from matplotlib.lines import Line2D

    looks = looks_of(rows)
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for row in rows:
        look = looks[row["contender"]]
        axes.scatter(
            row["intensity"], row["gflop_per_second"], s=46, alpha=0.85,
            facecolors=look.face, edgecolors=look.rim,
            linewidths=0.5 if look.rim == "white" else 1.5,
            marker=MARKERS[kinds.index(_kind(row)) % len(MARKERS)],
        )  # fmt: skip
    handles = [
        *(
            Line2D([], [], ls="", marker="o", label=name, **look.points())
            for name, look in looks.items()
        ),
        *(
            Line2D([], [], ls="", marker=MARKERS[i % len(MARKERS)], color="#777777", label=kind)
            for i, kind in enumerate(kinds)
        ),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=10, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip


def draw_contexts(rows: Rows) -> Any:
    """GB/s of K and V in decode against context length: a column a shape and dtype, a row a batch.

    Of batches of one context there is nothing to draw.
    """
    from matplotlib.figure import Figure

    decode = [row for row in rows if row["phase"] == "decode" and not row.get("mixed")]
    pairs = {(row["batch"], row["length"]) for row in decode}
    batches = sorted(b for b in {b for b, _ in pairs} if len([1 for x, _ in pairs if x == b]) > 1)
    if not batches:
        return None
    kinds = list(dict.fromkeys(_kind(row) for row in decode))
    looks = looks_of(decode)
    height = 1.6 + 3.0 * len(batches) if len(batches) > 1 else SIZE[1]
    figure = Figure(figsize=(SIZE[0], height), dpi=100, layout="constrained")
    grid = figure.subplots(len(batches), len(kinds), squeeze=False, sharey=True)
    for line, batch in zip(grid, batches, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            chosen = [r for r in decode if _kind(r) == kind and r["batch"] == batch]
            _draw_context(axes, chosen, looks)
            axes.set_title(f"{kind}, {batch} row" + ("s" if batch > 1 else ""), loc="left",
                           fontsize=11)  # fmt: skip
    grid[0, 0].set_ylim(bottom=0)  # shared, so only once all is drawn
    figure.supxlabel("context of each row (tokens, log scale)", fontsize=11)
    figure.supylabel("K and V read (GB/s)", fontsize=11)
    figure.suptitle(f"Decode by context, {_where(rows)}", fontsize=13)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    return figure


def _draw_context(axes: Any, rows: Rows, looks: dict[str, Look]) -> None:
    """The lines of one batch size."""
    for name, look in looks.items():
        line = sorted((r["length"], r["gb_per_second"]) for r in rows if r["contender"] == name)
        if line:
            style = {"ls": look.line, "marker": look.marker, **look.points()}
            axes.plot(*zip(*line, strict=True), **style, label=name)
    peak = sorted({(r["length"], r["peak"] / 1e9) for r in rows})
    if peak:
        axes.plot(*zip(*peak, strict=True), color="black", ls="--", lw=1, label="peak of the run")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_block_sizes(rows: Rows) -> Any:
    """Decode speed by block size, and the share of the slots that last blocks leave empty."""
    paged = [r for r in rows if r["phase"] == "decode" and re.fullmatch(PAGED, r["contender"])]
    sizes = sorted({_block_size(row) for row in paged})
    if len(sizes) < 2:
        return None
    figure, (speed, waste) = _new_figure(2)
    groups: dict[tuple[str, int, Any], dict[int, float]] = {}
    for row in paged:
        key = _kind(row), row["batch"], row.get("mixed") or row["length"]
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
        whole_blocks = [s for s in sizes if s <= length]  # of shorter rows the formula is wrong
        lost = [100 * (s - 1) / 2 / (length + (s - 1) / 2) for s in whole_blocks]
        colour = OKABE_ITO[i % len(OKABE_ITO)]
        waste.plot(
            whole_blocks, lost, marker=MARKERS[i], color=colour, label=f"{length:,} tokens a row"
        )
    speed.set_ylabel("decode speed (% of the fastest block size)")
    speed.set_title("Speed, measured: median of the cases,\nshaded from worst to best",
                    loc="left", fontsize=11)  # fmt: skip
    waste.set_ylabel("waste of allocated slots by the formula (%)")
    waste.set_title(
        "Waste by formula, (block size - 1) / 2 slots a row;\nof a trace: pykvcache replay",
        loc="left",
        fontsize=11,
    )
    for ax in (speed, waste):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.set_xlabel("block size (tokens)")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=10)
    figure.suptitle(f"Block size against speed and waste, {_where(rows)}", fontsize=13)
    return figure


def _block_size(row: dict[str, Any]) -> int:
    return int(row["contender"].split()[1])
