"""Speed against waste, a point a block size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pykvcache.bench.plots import use_plain_numbers
from pykvcache.bench.tune.plan import Tuning
from pykvcache.plot import OKABE_ITO


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
    trace = Path(found.request.workload.trace).name
    figure.suptitle(
        f"{shape.name} ({shape.dtype}), {found.request.memory} of KV cache, trace {trace}: "
        f"block size {found.outcome.block_size} recommended",
        fontsize=13,
    )
    figure.savefig(path)


def _speed_against_waste(axes: Any, rows: list[dict[str, Any]], tolerance: float) -> None:
    best = max(row["throughput"] for row in rows)
    xs = [max(row["waste"], 0.01) for row in rows]  # a logarithm has no 0
    ys = [100 * row["throughput"] / best for row in rows]
    axes.axhspan(100 * (1 - tolerance), 100, color=OKABE_ITO[4], alpha=0.25, lw=0)
    axes.plot(xs, ys, color="#999999", lw=1, zorder=1)
    for row, x, y in zip(rows, xs, ys, strict=True):
        chosen = row["chosen"]
        colour = OKABE_ITO[5] if chosen else OKABE_ITO[0]
        axes.scatter(x, y, s=160 if chosen else 60, marker="*" if chosen else "o", color=colour)
        label = str(row["block_size"])
        label += " (recommended)" if chosen else " (no waste)" if row["waste"] < 0.01 else ""
        at_edge = {min(xs): "left", max(xs): "right"} if " " in label else {}
        axes.annotate(label, (x, y), (0, 11 if chosen else -16), textcoords="offset points",
                      ha=at_edge.get(x, "center"), fontsize=10)  # fmt: skip
    axes.set_xscale("log")
    use_plain_numbers(axes.xaxis)
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel("waste: share of allocated slots without a live token (%, log scale)")
    axes.set_ylabel("generated tokens/s (% of the best)")
    axes.set_title(f"Speed against waste; shaded: within {100 * tolerance:.3g} % of the best",
                   loc="left", fontsize=11)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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
