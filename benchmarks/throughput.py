"""`python -m benchmarks.throughput`: many requests through the engine, beside a padded `generate`.

The Llama of benchmarks.generate completes 32 prompts of mixed or long lengths; CPU seconds, tokens
checked first. `--capacity` counts how many requests run at once on one budget of KV memory instead.
docs/measuring.md has the method.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.table import Table

from pykvcache.bench import environment, tables
from pykvcache.bench.generate import WORKLOADS
from pykvcache.bench.progress import task_progress
from pykvcache.bench.throughput import Capacity, Result, measure, measure_capacity
from pykvcache.cli import run


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
    columns = ("budget tokens", "requests", "padded", "engine", "ratio", "peak", "preempted")
    for column in (*columns, "peak / budget bytes"):
        table.add_column(column, justify="right")
    for c in found:
        table.add_row(
            f"{c.budget_tokens:,}",
            str(c.requests),
            f"{c.padded:.1f}",
            f"{c.engine:.1f}",
            f"{c.engine / c.padded:.2f}x",
            str(c.engine_peak),
            str(c.preemptions),
            f"{c.peak_bytes / c.budget_bytes:.3f}",
        )
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    workload: Annotated[str, typer.Option(help="mixed, long or all.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    generate_batch: Annotated[
        bool, typer.Option(help="Also transformers' generate_batch, which takes minutes.")
    ] = False,
    capacity: Annotated[bool, typer.Option(help="Count requests at once instead.")] = False,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Also save; - = stdout.")] = None,
) -> None:
    """Compare the engine with a padded batch, tokens checked first."""
    if workload not in ("all", *WORKLOADS):
        names = ", ".join(WORKLOADS)
        raise typer.BadParameter(f"--workload is one of {names}, all; got {workload!r}")
    torch.set_num_threads(threads)
    console = tables.open_console(stderr=json == "-")
    console.print(tables.environment_line(environment.describe()), soft_wrap=True)
    if capacity:
        found = [measure_capacity(n, budget) for n, budget in ((500, 65_536), (2000, 262_144))]
        console.print(capacity_table(found))
        if json is not None:
            tables.save_json(json, [asdict(entry) for entry in found])
        return
    chosen = list(WORKLOADS) if workload == "all" else [workload]
    results: list[Result] = []
    try:
        with task_progress("running", len(chosen) * repeats * (2 + generate_batch)) as advance:
            for name in chosen:
                results.append(measure(WORKLOADS[name], repeats, generate_batch, advance))
    except KeyboardInterrupt:
        console.print("interrupted; what was measured so far:")
    console.print(result_table(results))
    if json is not None:
        tables.save_json(json, [result.to_json() for result in results])


if __name__ == "__main__":
    sys.exit(run(app))
