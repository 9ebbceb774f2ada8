"""`python -m pykvcache bench generate`: `model.generate` unpatched, patched, and without attention.

A Llama of hidden size 512, 8 layers, 8 heads and 2 KV heads in bf16 generates for 32 prompts in one
batch padded on the left; CPU seconds. `no attention` is what no attention kernel can beat. The last
table is the time of a decode step of a small model at batch 1. docs/measuring.md has the method.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer
from rich.table import Table

from pykvcache.bench.generate import WORKLOADS, Result, measure, measure_step
from pykvcache.bench.progress import task_progress
from pykvcache.bench.timing import Interrupted, Timing
from pykvcache.cache import MAX_BLOCK_SIZE
from pykvcache.cli.bench.options import (
    MOST_THREADS,
    Compare,
    FailAbove,
    Json,
    Output,
    check_transformers,
)

STEP_RUNS = 10


def workload_table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("workload")
    for column in ("unpatched s", "patched s", "no attention s", "speed-up", "at most"):
        table.add_column(column, justify="right")
    for column in ("KV used MiB", "padded MiB", "used", "pool MiB"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.workload,
            *(f"{timing.median:.2f}" for timing in result.timings.values()),
            f"{result.speedup('patched'):.2f}x",
            f"{result.speedup('no attention'):.2f}x",
            f"{result.used_bytes / 2**20:.1f}",
            f"{result.padded_bytes / 2**20:.1f}",
            f"{100 * result.used_bytes / result.padded_bytes:.1f}%",
            f"{result.pool_bytes / 2**20:.1f}",
        )
    return table


def step_table(timings: dict[str, Timing]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("decode step, batch 1")
    for column in ("median us", "p10 us", "p90 us"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        times = (timing.median, timing.p10, timing.p90)
        table.add_row(name, *(f"{time * 1e6:.0f}" for time in times))
    return table


def generate(
    workload: Annotated[str, typer.Option(help="mixed, long, step or all.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS)] = 1,
    block_size: Annotated[int, typer.Option(min=1, max=MAX_BLOCK_SIZE)] = 16,
    json: Json = None,
    compare: Compare = None,
    fail_above: FailAbove = None,
) -> None:
    """Compare `generate` with and without pykvcache, tokens checked first."""
    names = [*WORKLOADS, "step"]
    if workload not in ("all", *names):
        raise typer.BadParameter(f"--workload is one of {', '.join(names)}, all; got {workload!r}")
    check_transformers("bench generate")
    chosen = names if workload == "all" else [workload]
    torch.set_num_threads(threads)
    output = Output(json, compare, fail_above)
    results: list[Result] = []
    step: dict[str, Timing] = {}
    runs = sum(2 * STEP_RUNS * repeats if name == "step" else 3 * repeats for name in chosen)
    complete = True
    try:
        with task_progress("generating", runs) as advance:
            for name in chosen:
                if name == "step":
                    step = measure_step(STEP_RUNS * repeats, block_size, advance)
                else:
                    results.append(measure(WORKLOADS[name], repeats, block_size, advance))
    except KeyboardInterrupt as stopped:
        complete = False
        if isinstance(stopped, Interrupted):
            if name == "step":
                step = stopped.kept
            else:
                results.append(stopped.kept)
        output.interrupted(results or step)
    if results:
        output.console.print(workload_table(results))
        output.console.print(
            "not measured: transformers' generate_batch, which is no call of generate; "
            "bench engine times it",
            soft_wrap=True,
        )
    if step:
        output.console.print(step_table(step))
    rows = [result.to_json() for result in results]
    if step:
        timings = {name: asdict(timing) for name, timing in step.items()}
        rows.append({"workload": "step", "threads": threads, "timings": timings})
    output.finish([row | {"block_size": block_size} for row in rows], complete)
