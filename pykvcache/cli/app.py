"""The typer application: which commands there are."""

from __future__ import annotations

import typer

from pykvcache.cli.bench import app as bench
from pykvcache.cli.demo import demo
from pykvcache.cli.info import info
from pykvcache.cli.replay import replay
from pykvcache.cli.tune import tune

app = typer.Typer(
    name="pykvcache",
    help="A block-paged KV cache for PyTorch and Hugging Face models.",
    epilog="Example: python -m pykvcache demo. Each command has --help with an example of its own.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
REPLAY_EXAMPLE = (
    "Example: python -m pykvcache replay --trace azure-conv --memory 8GiB "
    "--model-config llama-3.1-8b --plot replay.png"
)


@app.callback(invoke_without_command=True)
def show_help(context: typer.Context) -> None:
    """Print the commands when none was named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(epilog="Example: python -m pykvcache info --json")(info)
app.command(epilog="Example: python -m pykvcache demo --batch 8 --plot blocks.png")(demo)
app.command(epilog=REPLAY_EXAMPLE)(replay)
app.command(epilog="Example: python -m pykvcache tune --model-config qwen3-4b --plot tune.png")(
    tune
)
app.add_typer(bench, name="bench")
