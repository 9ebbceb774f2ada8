"""`python -m benchmarks.prefix`: how much of a trace a prefix cache finds, by size of the pool."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pykvcache.bench import environment, tables
from pykvcache.bench.prefix import Replay, replay
from pykvcache.bench.progress import task_progress
from pykvcache.bench.traces import read_prefix_blocks
from pykvcache.cli import run


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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    trace: Annotated[str, typer.Option(help="Name or file with hash_ids.")] = "mooncake-conv",
    num_blocks: Annotated[
        list[int] | None, typer.Option(min=0, help="Sizes of the pool; 0 = unlimited.")
    ] = None,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Also save; - = stdout.")] = None,
) -> None:
    """Replay a trace through the allocator's prefix cache."""
    console = tables.open_console(stderr=json == "-")
    console.print(tables.environment_line(environment.describe()), soft_wrap=True)
    sizes = [10_000, 30_000, 0] if num_blocks is None else num_blocks
    try:
        requests = list(read_prefix_blocks(trace))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None
    with task_progress("replaying", len(sizes) * len(requests)) as advance:
        replays = [replay(requests, size or None, advance) for size in sizes]
    console.print(replay_table(replays, trace), soft_wrap=True)
    if json is not None:
        rows = [asdict(result) | {"hit_rate": result.hit_rate} for result in replays]
        tables.save_json(json, rows)


if __name__ == "__main__":
    sys.exit(run(app))
