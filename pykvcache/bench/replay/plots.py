"""Pictures of a replay: shares as stacked bars, and who holds which slot over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykvcache.bench.replay.blockmap import BlockMap, draw_maps
from pykvcache.bench.replay.cases import PADDED, PAGED, Case
from pykvcache.bench.replay.plan import Plan, counted
from pykvcache.bench.replay.report import labels_of
from pykvcache.bench.replay.totals import SHARES, Result

COLOURS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    "live": "#0072B2",
    "reserved": "#56B4E9",
    "internal": "#D55E00",
    "rounding": "#E69F00",
    "external": "#E4E4E4",
}
MEANINGS = {
    "live": "live: tokens in use",
    "reserved": "reserved: will be filled",
    "internal": "internal: never filled",
    "rounding": "rounding of the allocator",
    "external": "external: not allocated",
}
RESIDENCIES, REFILLS = 25, 3  # the time that a map shows
MOST_MAPS = 3
LONGEST_NAME = 60  # characters of a trace in the title


def plot_replay(plan: Plan, results: Sequence[Result], path: str | Path) -> None:
    """Save bars of all results and maps of up to three of them, 1,200 pixels wide.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    mapped = choose_maps([Case(r.policy, r.block_size) for r in results])
    bars = 1.6 + 0.34 * len(results)
    heights = [bars, 4.4] if mapped else [bars]
    figure = Figure(figsize=(12, sum(heights)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_bars(parts[0].add_subplot(), results, title_of(plan))
    if mapped:
        seconds = seconds_of(plan, [r for r in results if Case(r.policy, r.block_size) in mapped])
        draw_panels(parts[1], plan, draw_maps(plan, mapped, seconds))
    figure.savefig(path)


def seconds_of(plan: Plan, results: Sequence[Result]) -> float:
    """The time that maps of these results show: some turns of the memory, at most all.

    With the arrivals of the trace it is all: nobody knows when the memory is full.
    """
    cost = plan.rules.cost
    total = max(result.seconds.total for result in results)
    seconds = RESIDENCIES * plan.survey.output * cost.base
    seconds += REFILLS * plan.budget.slots * cost.per_prefill_token
    return min(seconds, total or seconds) if plan.rules.saturated else total or seconds


def choose_maps(cases: Sequence[Case]) -> list[Case]:
    """Two contiguous cases at most, and the paged one of block size 16 or nearest to it."""
    contiguous = [case for case in cases if case.policy not in (PADDED, PAGED)]
    first = contiguous[:1] + [c for c in contiguous[1:] if c.policy.endswith("buddy")][:1]
    paged = sorted(
        (case for case in cases if case.policy == PAGED),
        key=lambda case: abs((case.block_size or 0) - 16),
    )
    return [*first, *paged[:1]][:MOST_MAPS]


def title_of(plan: Plan) -> str:
    trace = Path(plan.workload.trace).name
    if len(trace) > LONGEST_NAME:
        trace = f"{trace[: LONGEST_NAME // 2]}...{trace[-LONGEST_NAME // 2 :]}"
    return (
        f"{trace}, {counted(plan.survey.count, 'request')}, {plan.budget.slots:,} token slots, "
        f"max-len {plan.max_len:,}"
    )


def draw_bars(axes: Any, results: Sequence[Result], title: str) -> None:
    """A horizontal bar a result; its five shares add up to 100 %."""
    lines = np.arange(len(results))
    left = np.zeros(len(results))
    for name in SHARES:
        widths = np.array([result.shares()[name] for result in results])
        axes.barh(
            lines, widths, left=left, color=COLOURS[name], label=MEANINGS[name],
            edgecolor="white", linewidth=0.5, height=0.82,
        )  # fmt: skip
        left += widths
    for line, result in enumerate(results):
        share = result.shares()["live"]
        inside = share > 8
        axes.text(
            share / 2 if inside else share + 1.2, line, f"{share:.1f} %",
            ha="center" if inside else "left", va="center",
            color="white" if inside else "black", fontsize=9,
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        text = f"{result.throughput:,.0f} tokens/s, batch {result.mean_batch:.1f}"
        axes.text(101, line, text, va="center", fontsize=9)
    axes.set_yticks(lines, labels_of(results))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(axis_label(results))
    axes.set_title(title, loc="left", fontsize=11, pad=30, parse_math=False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(SHARES), frameon=False, fontsize=9,
        borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def axis_label(results: Sequence[Result]) -> str:
    """What the bars are shares of, also where that is not the same for all."""
    calm = [not result.waiting.seconds for result in results]
    if all(calm):
        return "share of the allocated part of the KV cache; no request had to wait (%)"
    label = "share of the KV cache, averaged over the time in which requests wait (%)"
    if any(calm):
        label += "\n* share of the allocated part only; no request had to wait"
    return label


def draw_panels(part: Any, plan: Plan, maps: Sequence[BlockMap]) -> None:
    """Maps side by side, with the same two axes."""
    slots = plan.budget.slots
    panels = part.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]
    for axes, drawn in zip(panels, maps, strict=True):
        is_engine = drawn.case.policy == PAGED and plan.rules.scheduler == "engine"
        draw_cells(axes, drawn)
        axes.set_title(drawn.case.label + (", engine" if is_engine else ""), fontsize=10)
    panels[0].set_ylabel("token slot (thousands)" if maps[0].unit > 1 else "token slot")
    part.get_layout_engine().set(wspace=0.04)  # tick labels of neighbours stay apart
    if maps[0].slots < slots:
        shown = f"the lowest {maps[0].slots:,} of {slots:,} token slots"
        part.suptitle(f"{shown}; in this time all others are free", fontsize=10)


def draw_cells(axes: Any, drawn: BlockMap) -> None:
    """Addresses upwards, time to the right, in the colours of the bars."""
    from matplotlib.colors import ListedColormap

    axes.imshow(
        drawn.cells, cmap=ListedColormap([COLOURS[name] for name in SHARES]),
        vmin=-0.5, vmax=len(SHARES) - 0.5, origin="lower", aspect="auto",
        interpolation="nearest", extent=(0, drawn.seconds, 0, drawn.slots / drawn.unit),
    )  # fmt: skip
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("time since the start (s)")
