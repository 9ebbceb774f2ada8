"""`python -m pykvcache bench`: what is timed, one file a command.

Each turns options into a call of pykvcache/bench/ and prints, saves and compares what it returns.
"""

from __future__ import annotations

import typer

from pykvcache.cli.bench.allocator import allocator
from pykvcache.cli.bench.engine import engine
from pykvcache.cli.bench.generate import generate
from pykvcache.cli.bench.kernels import kernels
from pykvcache.cli.bench.prefix import prefix

app = typer.Typer(
    help="Time kernels, engine, generate and allocator; compare with an earlier run.",
    epilog="Example: python -m pykvcache bench kernels --quick --plot plots",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
EXAMPLE = "Example: python -m pykvcache bench"
app.command(epilog=f"{EXAMPLE} kernels --quick --json now.json --compare before.json")(kernels)
app.command(epilog=f"{EXAMPLE} engine --workload mixed --repeats 5")(engine)
app.command(epilog=f"{EXAMPLE} generate --workload mixed --repeats 5")(generate)
app.command(epilog=f"{EXAMPLE} allocator --compare before.json --fail-above 1.2")(allocator)
app.command(epilog=f"{EXAMPLE} prefix --num-blocks 10000 --num-blocks 0")(prefix)
