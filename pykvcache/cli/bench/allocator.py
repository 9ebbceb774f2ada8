"""`python -m pykvcache bench allocator`: what the block allocator costs, goal beside measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pykvcache.bench.allocator import Row, allocator_table, time_calls, time_inside
from pykvcache.bench.progress import task_progress
from pykvcache.cli.bench.options import Compare, FailAbove, Json, Output, check_seconds


def allocator(
    num_blocks: Annotated[int, typer.Option(help="Blocks in the pool.", min=200_000)] = 1_000_000,
    repeats: Annotated[int, typer.Option(help="Repetitions in C++.", min=1)] = 51,
    seconds: Annotated[float, typer.Option(help="Time for the calls from Python.")] = 8.0,
    json: Json = None,
    compare: Compare = None,
    fail_above: FailAbove = None,
) -> None:
    """Time the block allocator inside C++ and through Python."""
    check_seconds(seconds)
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
        output.interrupted()
    output.console.print(allocator_table(rows, num_blocks), soft_wrap=True)
    output.finish([asdict(row) | {"num_blocks": num_blocks} for row in rows], complete)
