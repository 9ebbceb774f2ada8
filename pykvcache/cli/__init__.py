"""The command line: `python -m pykvcache COMMAND`, or `pykvcache COMMAND` once installed.

One file a command; each turns options into a call of pykvcache/bench/ and prints what it returns.
A wrong argument is one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command in sys.argv and return its exit code."""
    import typer

    from pykvcache.cli.app import app

    command = typer.main.get_command(app)
    try:
        return command(standalone_mode=False) or 0
    except (typer.Abort, KeyboardInterrupt):
        print("pykvcache: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors; which click depends on typer
            raise
        print(f"pykvcache: {error.format_message()}", file=sys.stderr)
        return 2
