"""Speed against waste, a point a block size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pykvcache.bench.plots import use_plain_numbers
from pykvcache.bench.tune.plan import Tuning
from pykvcache.plot import OKABE_ITO

LONGEST_NAME = 32  # characters of a model's or a trace's name


def plot_tuning(found: Tuning, path: str | Path) -> None:
    """Save the picture, 1,200 pixels wide (format by suffix).

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = found.to_json()
    figure = Figure(figsize=(12, 5.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    _speed_against_waste(left, rows, found.request.tolerance)
    _decode_by_block_size(right, rows, found.bandwidth)
    shape = found.request.shape
    model = shorten(shape.name, LONGEST_NAME)
    trace = shorten(Path(found.request.workload.trace).name, LONGEST_NAME)
    figure.suptitle(
        f"block size {found.outcome.block_size} recommended for {model} ({shape.dtype}), "
        f"{found.request.memory} of KV cache, trace {trace}",
        fontsize=13,
        parse_math=False,
    )
    figure.savefig(path)


def _speed_against_waste(axes: Any, rows: list[dict[str, Any]], tolerance: float) -> None:
    best = max(row["throughput"] for row in rows)
    xs = [max(row["waste"], 0.01) for row in rows]  # a logarithm has no 0
    ys = [100 * row["throughput"] / best for row in rows]
    axes.axhspan(100 * (1 - tolerance), 100, color=OKABE_ITO[4], alpha=0.25, lw=0)
    axes.plot(xs, ys, color="#999999", lw=1, zorder=1)
    labels = []
    for row, x, y in zip(rows, xs, ys, strict=True):
        chosen = row["chosen"]
        colour = OKABE_ITO[5] if chosen else OKABE_ITO[0]
        axes.scatter(x, y, s=160 if chosen else 60, marker="*" if chosen else "o", color=colour)
        label = str(row["block_size"])
        label += " (recommended)" if chosen else " (no waste)" if row["waste"] < 0.01 else ""
        labels.append(label)
    axes.set_xscale("log")
    use_plain_numbers(axes.xaxis, few=max(xs) > 300 * min(xs))
    axes.margins(x=0.18, y=0.18)
    _place_labels(axes, xs, ys, labels)
    axes.set_xlabel("waste: share of allocated slots without a live token (%, log scale)")
    axes.set_ylabel("generated tokens/s (% of the best)")
    axes.set_title(f"Speed against waste; shaded: within {100 * tolerance:.3g} % of the best",
                   loc="left", fontsize=11)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: Any, xs: list[float], ys: list[float], labels: list[str]) -> None:
    """A label beside each point, where it covers no other label and no other point.

    Tried in turn: below, above, and further away on either side. Boxes are estimated, in points.
    """
    axes.autoscale_view()
    pixels = axes.transData.transform([*zip(xs, ys, strict=True)])
    points = [tuple(p * 72 / axes.figure.dpi) for p in pixels]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    spots = [(0, -17), (0, 10), *((0, s * d) for d in (30, 43, 56) for s in (-1, 1))]
    for (x, y), data, label in zip(points, zip(xs, ys, strict=True), labels, strict=True):
        half = 3.1 * len(label) + 2
        boxes = {
            (dx, dy): (x + dx - half, y + dy - 1, x + dx + half, y + dy + 11) for dx, dy in spots
        }
        free = [s for s in spots if not any(_overlap(boxes[s], other) for other in taken)]
        spot = free[0] if free else spots[0]
        taken.append(boxes[spot])
        far = {"arrowprops": {"arrowstyle": "-", "color": "#999999"}} if abs(spot[1]) > 20 else {}
        axes.annotate(label, data, spot, textcoords="offset points", ha="center", fontsize=10,
                      **far)  # fmt: skip


Box = tuple[float, float, float, float]  # left, bottom, right, top


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shorten(name: str, most: int) -> str:
    """A name of at most `most` characters; the middle gives way."""
    half = (most - 3) // 2
    return name if len(name) <= most else f"{name[:half]}...{name[-half:]}"


def _decode_by_block_size(axes: Any, rows: list[dict[str, Any]], bandwidth: float) -> None:
    sizes = [row["block_size"] for row in rows]
    speed = [row["decode_gb_per_second"] for row in rows]
    low, high = [], []
    for row in rows:
        moved = row["decode_ns_per_token"] * row["decode_gb_per_second"]  # bytes of a token
        low.append(max(0.0, row["decode_gb_per_second"] - moved / row["decode_p90"]))
        high.append(max(0.0, moved / row["decode_p10"] - row["decode_gb_per_second"]))
    axes.errorbar(sizes, speed, yerr=[low, high], color=OKABE_ITO[0], marker="o", capsize=4,
                  label="decode, best launch (median, p10 to p90)")  # fmt: skip
    axes.axhline(bandwidth / 1e9, color=OKABE_ITO[5], ls="--", label="plain reads of this device")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block size (tokens)")
    axes.set_ylabel("K and V read (GB/s)")
    axes.set_title("Decode by block size", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=10, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
