"""`python -m pykvcache bench engine`: many requests through the engine.

Requests of mixed or long lengths beside a padded `generate` and transformers' own batching; what a
step costs outside the model; how many requests run at once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.table import Table

from pykvcache.bench.generate import WORKLOADS
from pykvcache.bench.progress import task_progress
from pykvcache.bench.throughput import (
    CONTENDERS,
    Capacity,
    Overhead,
    Result,
    measure,
    measure_capacity,
    measure_overhead,
)
from pykvcache.bench.timing import Interrupted
from pykvcache.cli.bench.options import (
    MOST_THREADS,
    Compare,
    FailAbove,
    Json,
    Output,
    check_transformers,
    integers,
)

MOST_ROWS, MOST_STEPS = 4096, 100_000
ROWS, STEPS = "1,8,32,256", 200
CAPACITIES = ((500, 65_536), (1000, 131_072), (2000, 262_144))  # requests, tokens of the pool


def result_table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("workload", "contender"):
        table.add_column(column)
    for column in ("CPU s", "p10", "p90", "output tokens/s", "speed-up"):
        table.add_column(column, justify="right")
    for result in results:
        for name, timing in result.timings.items():
            table.add_row(
                result.workload,
                name,
                *(f"{seconds:.2f}" for seconds in (timing.median, timing.p10, timing.p90)),
                f"{result.output_tokens / timing.median:,.0f}",
                f"{result.speedup(name):.2f}x",
            )
    return table


def capacity_table(found: list[Capacity]) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("budget tokens", "padded", "generating", "engine", "ratio", "peak", "preempted")
    for column in (*columns, "bytes", "float8", "ratio"):
        table.add_column(column, justify="right")
    for c in found:
        table.add_row(
            f"{c.budget_tokens:,}",
            f"{c.padded:.1f}",
            f"{c.padded_generating:.1f}",
            f"{c.engine:.1f}",
            f"{c.engine / c.padded:.2f}x",
            str(c.engine_peak),
            str(c.preemptions),
            f"{c.peak_bytes / c.budget_bytes:.3f}",
            f"{c.engine_float8:.1f}",
            f"{c.engine_float8 / c.padded:.2f}x",
        )
    return table


def overhead_table(found: list[Overhead]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("rows", "plan us", "settle us", "rest us", "outside us", "step us", "us a row"):
        table.add_column(column, justify="right")
    for o in found:
        times = (o.plan, o.settle, o.rest, o.outside, o.step)
        table.add_row(str(o.rows), *(f"{time:.0f}" for time in times), f"{o.outside / o.rows:.2f}")
    return table


def engine(
    workload: Annotated[str, typer.Option(help="mixed, long or all.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS)] = 1,
    longest_run: Annotated[
        float, typer.Option(min=1, help="Seconds; generate_batch is left out if a run takes more.")
    ] = 60,
    capacity: Annotated[bool, typer.Option(help="Count requests at once instead.")] = False,
    overhead: Annotated[bool, typer.Option(help="Time a step outside the model instead.")] = False,
    rows: Annotated[
        str | None, typer.Option(help=f"With --overhead: numbers of rows; {ROWS}.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=10, max=MOST_STEPS, help=f"With --overhead: steps of each; {STEPS}."),
    ] = None,
    json: Json = None,
    compare: Compare = None,
    fail_above: FailAbove = None,
) -> None:
    """Compare the engine with a padded batch and generate_batch, tokens checked first."""
    if workload not in ("all", *WORKLOADS):
        names = ", ".join(WORKLOADS)
        raise typer.BadParameter(f"--workload is one of {names}, all; got {workload!r}")
    if capacity and overhead:
        raise typer.BadParameter("--capacity and --overhead are two measurements; give one")
    if not overhead and (rows is not None or steps is not None):
        raise typer.BadParameter("--rows and --steps need --overhead")
    counts = row_counts(rows or ROWS)
    check_transformers("bench engine")
    torch.set_num_threads(threads)
    output = Output(json, compare, fail_above)
    if capacity:
        measure_capacities(output)
    elif overhead:
        measure_overheads(output, counts, steps or STEPS)
    else:
        chosen = list(WORKLOADS) if workload == "all" else [workload]
        measure_throughput(output, chosen, repeats, longest_run)


def overhead(
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = ROWS,
    steps: Annotated[int, typer.Option(min=10, max=MOST_STEPS, help="Steps of each.")] = STEPS,
    json: Json = None,
) -> None:
    """Measure the engine's own code."""
    counts = row_counts(rows)
    check_transformers("bench engine")
    torch.set_num_threads(1)
    measure_overheads(Output(json), counts, steps)


def row_counts(text: str) -> list[int]:
    """Raise BadParameter for more rows than a step is measured with."""
    counts = integers("--rows", text)
    if max(counts) > MOST_ROWS:
        raise typer.BadParameter(f"--rows must be at most {MOST_ROWS}, got {max(counts)}")
    return counts


def measure_throughput(
    output: Output, workloads: list[str], repeats: int, longest_run: float
) -> None:
    results: list[Result] = []
    missing: dict[str, str] = {}
    complete = True
    try:
        with task_progress("running", len(workloads) * repeats * CONTENDERS) as advance:
            for name in workloads:
                advance(0, f"running {name}")
                results.append(measure(WORKLOADS[name], repeats, longest_run, missing, advance))
    except KeyboardInterrupt as stopped:
        complete = False
        if isinstance(stopped, Interrupted):
            results.append(stopped.kept)
        output.interrupted(results)
    if results:
        output.console.print(result_table(results))
    for name, reason in missing.items():
        output.console.print(f"not measured: {name} {reason}", soft_wrap=True)
    output.finish([result.to_json() for result in results], complete)


def measure_capacities(output: Output) -> None:
    found: list[Capacity] = []
    complete = True
    try:
        with task_progress("counting", len(CAPACITIES)) as advance:
            for count, budget in CAPACITIES:
                found.append(measure_capacity(count, budget))
                advance()
    except KeyboardInterrupt:
        complete = False
        output.interrupted(found)
    if found:
        output.console.print(capacity_table(found))
    output.finish([asdict(entry) for entry in found], complete)


def measure_overheads(output: Output, counts: list[int], steps: int) -> None:
    found: list[Overhead] = []
    complete = True
    try:
        with task_progress("stepping", len(counts)) as advance:
            for count in counts:
                found.append(measure_overhead(count, steps))
                advance()
    except KeyboardInterrupt:
        complete = False
        output.interrupted(found)
    if found:
        output.console.print(overhead_table(found))
    output.finish([asdict(entry) for entry in found], complete)
