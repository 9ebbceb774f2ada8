"""`python -m pykvcache bench allocator`: what the block allocator costs, goal beside measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pykvcache.bench import environment
from pykvcache.bench.allocator import Row, allocator_table, time_calls, time_inside
from pykvcache.bench.progress import task_progress
from pykvcache.cli.bench.options import Compare, FailAbove, Json, Output, check_seconds

MOST_BLOCKS = 2**27
BYTES_A_BLOCK = 4 * 31  # of the pools that are there at once


def allocator(
    num_blocks: Annotated[
        int, typer.Option(min=200_000, max=MOST_BLOCKS, help="Blocks in the pool.")
    ] = 1_000_000,
    repeats: Annotated[int, typer.Option(help="Repetitions in C++.", min=1)] = 51,
    seconds: Annotated[float, typer.Option(help="Time for the calls from Python.")] = 8.0,
    json: Json = None,
    compare: Compare = None,
    fail_above: FailAbove = None,
) -> None:
    """Time the block allocator inside C++ and through Python."""
    check_seconds(seconds)
    check_memory(num_blocks)
    output = Output(json, compare, fail_above)
    rows: list[Row] = []
    complete = True
    try:
        with task_progress("inside C++", 2) as advance:
            rows += time_inside(num_blocks, repeats)
            advance(title="calls from Python")
            rows += time_calls(num_blocks, seconds)
            advance()
    except KeyboardInterrupt:
        complete = False
        output.interrupted(rows)
    if rows:
        output.console.print(allocator_table(rows, num_blocks), soft_wrap=True)
    output.finish([asdict(row) | {"num_blocks": num_blocks} for row in rows], complete)


def check_memory(num_blocks: int) -> None:
    """Raise BadParameter when the pools would not fit."""
    needed, free = BYTES_A_BLOCK * num_blocks, environment.free_memory()
    if free is not None and needed > free:
        raise typer.BadParameter(
            f"--num-blocks {num_blocks} takes {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free"
        )
