"""`python -m benchmarks.engine_overhead`: what a decode step costs outside the model.

Microseconds of planning (scheduler and allocator), settling (argmax, ends) and the rest (token ids,
metadata, bookkeeping), on a model so small that little else is there.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.table import Table

from pykvcache.bench import environment, tables
from pykvcache.bench.throughput import Overhead, measure_overhead
from pykvcache.cli import run


def overhead_table(found: list[Overhead]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("rows", "plan us", "settle us", "rest us", "outside us", "step us", "us a row"):
        table.add_column(column, justify="right")
    for o in found:
        times = (o.plan, o.settle, o.rest, o.outside, o.step)
        table.add_row(str(o.rows), *(f"{time:.0f}" for time in times), f"{o.outside / o.rows:.2f}")
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,8,32,256",
    steps: Annotated[int, typer.Option(min=10, help="Steps of each.")] = 200,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Also save; - = stdout.")] = None,
) -> None:
    """Measure the engine's own code."""
    torch.set_num_threads(1)
    console = tables.open_console(stderr=json == "-")
    console.print(tables.environment_line(environment.describe()), soft_wrap=True)
    found = [measure_overhead(int(count), steps) for count in rows.split(",")]
    console.print(overhead_table(found))
    if json is not None:
        tables.save_json(json, [asdict(entry) for entry in found])


if __name__ == "__main__":
    sys.exit(run(app))
