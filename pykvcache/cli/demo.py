"""`python -m pykvcache demo`: the same batch with and without pykvcache, compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pykvcache.bench import demo as bench
from pykvcache.bench import tables
from pykvcache.bench.progress import task_progress
from pykvcache.cli.bench.options import check_output, check_picture, check_transformers


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of a model that reads text; a small random Llama."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Prompts in the batch.")] = 16,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Chooses the prompt lengths.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of the block map.")
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the figures; - = standard output.")
    ] = None,
) -> None:
    """Generate for a batch of prompts unpatched, then patched, and compare.

    Prompt lengths are those of real requests. Exit code 1 if tokens differ in float32,
    2 if the model cannot be compared.
    """
    if dtype not in bench.DTYPES:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(bench.DTYPES)}, got {dtype!r}")
    if plot is not None:
        check_picture(plot)
    if json is not None and json != "-":
        check_output("--json", json)
    check_transformers("demo")
    lengths = bench.prompt_lengths(batch, seed)
    try:
        loaded = bench.load_model(model, bench.DTYPES[dtype])
        with task_progress("generating", 2 * max_new_tokens) as advance:
            found = bench.compare(loaded, lengths, max_new_tokens, block_size, advance)
    except bench.Interrupted as stopped:
        keep_unpatched(stopped, json, {"dtype": dtype, "model": model})
        raise typer.Abort from None
    except (OSError, TypeError, ValueError) as error:
        prefix = f"--model {model}: " if model else ""
        raise typer.BadParameter(prefix + str(error).partition("\n")[0]) from error
    console = tables.open_console(stderr=json == "-")
    console.print(demo_table(found))
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(verdict(found))
    if plot is not None:
        found.cache.plot(plot)
        console.print(f"block map: {plot}")
    if json is not None:
        tables.save_json(json, [found.to_json() | {"dtype": dtype, "model": model}])
    if found.difference is not None and dtype == "float32":
        raise typer.Exit(1)


def keep_unpatched(stopped: bench.Interrupted, json: str | None, beside: dict[str, object]) -> None:
    """Show and save the run that was complete at Ctrl-C."""
    console = tables.open_console(stderr=json == "-")
    console.print("interrupted; the unpatched run was complete:")
    console.print(demo_table(stopped))
    if json is not None:
        row = {"prompt_lengths": stopped.prompt_lengths, "new_tokens": stopped.new_tokens}
        tables.save_json(json, [row | {"unpatched": asdict(stopped.unpatched)} | beside])


def demo_table(found: bench.Comparison | bench.Interrupted) -> Table:
    """One line a run."""
    lengths = found.prompt_lengths
    title = (
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{found.new_tokens} new tokens each"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("seconds", "tokens/s", "KV MiB", "of it waste"):
        table.add_column(column, justify="right")
    runs = [("unpatched", found.unpatched, "padding")]
    if isinstance(found, bench.Comparison):
        runs.append(("patched", found.patched, "last blocks"))
    for name, run, reason in runs:
        table.add_row(
            name,
            f"{run.seconds:.2f}",
            f"{run.tokens_per_second:.0f}",
            f"{run.kv_bytes / 2**20:.2f}",
            f"{100 * run.waste:.1f}% ({reason})",
        )
    return table


def verdict(found: bench.Comparison) -> str:
    """Whether the tokens are identical, and if not where they part."""
    difference = found.difference
    if difference is None:
        return "tokens identical: yes"
    return (
        f"tokens identical: no; first at row {difference.row}, new token {difference.step}: "
        f"{difference.unpatched_token} unpatched, {difference.patched_token} patched, "
        f"logit margin {difference.margin:.3g}"
    )
