"""`python -m pykvcache bench prefix`: what a prefix cache finds, by size of the pool."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pykvcache.bench.prefix import Replay, replay
from pykvcache.bench.progress import task_progress
from pykvcache.bench.traces import read_prefix_blocks
from pykvcache.cli.bench.options import Json, Output, check_results, input_files


def replay_table(replays: list[Replay], trace: str) -> Table:
    """One line a pool: hits are blocks, and their share is of all block references."""
    requests, references = replays[0].requests, replays[0].references
    title = f"{trace}: {requests:,} requests, {references:,} block references, evicted by LRU"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("pool", "hits", "share", "evictions", "us a request"):
        table.add_column(column, justify="right")
    for result in replays:
        table.add_row(
            "unlimited" if result.num_blocks is None else f"{result.num_blocks:,}",
            f"{result.hits:,}",
            f"{100 * result.hit_rate:.1f} %",
            f"{result.evictions:,}",
            f"{1e6 * result.seconds / max(result.requests, 1):.1f}",
        )
    return table


def prefix(
    trace: Annotated[str, typer.Option(help="Name or file with hash_ids.")] = "mooncake-conv",
    num_blocks: Annotated[
        list[int] | None, typer.Option(min=0, help="Sizes of the pool; 0 = unlimited.")
    ] = None,
    json: Json = None,
) -> None:
    """Replay a trace through the allocator's prefix cache."""
    sizes = [10_000, 30_000, 0] if num_blocks is None else num_blocks
    try:
        requests = list(read_prefix_blocks(trace))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None
    output = Output(json)
    check_results(input_files(trace), json=json)
    replays: list[Replay] = []
    complete = True
    try:
        with task_progress("replaying", len(sizes) * len(requests)) as advance:
            for size in sizes:
                replays.append(replay(requests, size or None, advance))
    except KeyboardInterrupt:
        complete = False
        output.interrupted(replays)
    if replays:
        output.console.print(replay_table(replays, trace), soft_wrap=True)
    rows = [asdict(result) | {"hit_rate": result.hit_rate} for result in replays]
    output.finish(rows, complete)
