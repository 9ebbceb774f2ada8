"""Tables and sentences about a tuning run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from pykvcache.bench.tune.objective import Demand
from pykvcache.bench.tune.plan import Tuning


def tuning_table(found: Tuning) -> Table:
    """A line a block size; > is the recommended one, = those that count as equally fast."""
    request = found.request
    title = (
        f"{request.shape.name}, {request.shape.dtype}, {request.memory} of KV cache; tokens/s of "
        "attention and weights alone, to compare block sizes; waste of what is allocated, live of "
        "the memory and batch over the whole replay"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    columns = ("block size", "waste %", "live %", "mean batch", "GB/s", "ns a token", "p10", "p90")
    for column in (*columns, "prefill us", "tokens/s", "of best"):
        table.add_column(column, justify="right")
    table.add_column("launch", no_wrap=True)
    rows = found.to_json()
    best = max(row["throughput"] for row in rows)
    for row in rows:
        table.add_row(
            ">" if row["chosen"] else "=" if row["tied"] else "",
            str(row["block_size"]),
            f"{row['waste']:.2f}",
            f"{row['live']:.1f}",
            f"{row['mean_batch']:.1f}",
            f"{row['decode_gb_per_second']:.1f}",
            *(f"{row[f'decode_{key}']:.0f}" for key in ("ns_per_token", "p10", "p90")),
            f"{row['prefill_ns_per_token'] / 1e3:.1f}",
            f"{row['throughput']:.2f}",
            f"{100 * row['throughput'] / best:.1f} %",
            ", ".join(f"{key}={value}" for key, value in row["launch"].items()) or "default",
        )
    return table


def demand_table(demands: Mapping[int, Demand]) -> Table:
    """What the replay alone has found, for a run that ended before the kernels were compared."""
    table = Table(box=None, pad_edge=False)
    for column in ("block size", "waste %", "live %", "mean batch"):
        table.add_column(column, justify="right")
    for size, demand in sorted(demands.items()):
        figures = (f"{demand.waste:.2f}", f"{demand.live:.1f}", f"{demand.mean_batch:.1f}")
        table.add_row(str(size), *figures)
    return table


def reasons(found: Tuning) -> list[str]:
    """Why the recommended block size was chosen, in sentences."""
    outcome, objective, request = found.outcome, found.objective, found.request
    size = outcome.block_size
    demand = objective.demands[size]
    parts = objective.parts(size, outcome.times[size])
    shares = [100 * part / sum(parts) for part in parts]
    others = [str(other) for other in outcome.tied if other != size]
    tolerance = f"{100 * request.tolerance:.3g} %"
    if others:
        why = "it wastes least"
        if demand.waste <= request.little_waste:
            why = f"the largest that wastes at most {request.little_waste:.3g} %"
        first = (
            f"block size {size}: as fast as {', '.join(others)} within {tolerance}, and of these "
            f"{why} ({demand.waste:.2f} % of the allocated slots)"
        )
    else:
        first = f"block size {size}: fastest by more than {tolerance}"
    rows = f", rows {found.rows} in prefill" if found.rows else ""
    lines = [
        first,
        f"time goes to reading the weights ({shares[0]:.0f} %), decode ({shares[1]:.0f} %) and "
        f"prompts ({shares[2]:.0f} %); mean batch {demand.mean_batch:.1f}",
        f"launch: {outcome.choice.launch}{rows}",
        f"{outcome.rounds} rounds over {len(outcome.samples)} candidates, read bandwidth "
        f"{found.bandwidth / 1e9:.1f} GB/s",
    ]
    if found.backend == "cuda":
        lines.append("measured the cuda kernels, which choose their launches themselves")
    elif found.backend == "triton":
        lines.append("measured the triton kernels: the launch table is for them alone")
    if found.interrupted:
        lines[0] = "so far, " + lines[0]
    elif not outcome.settled:
        lines.append("not everything was decided in this time; more --seconds would decide it")
    return lines
