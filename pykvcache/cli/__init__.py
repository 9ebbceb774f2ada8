"""The command line: `python -m pykvcache COMMAND`, or `pykvcache COMMAND` once installed.

One file a command; each turns options into a call of pykvcache/bench/ and prints what it returns.
A wrong argument is one line on standard error and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130


def main() -> int:
    """Run the command in sys.argv and return its exit code."""
    try:
        from pykvcache.cli.app import app  # seconds go by here
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return run(app)


def run(app: typer.Typer) -> int:
    """Run a typer application on sys.argv; returns the exit code.

    2 = wrong arguments, 1 = wrong result or a file that could not be written, 130 = Ctrl-C.
    """
    try:
        import typer

        from pykvcache.bench.timing import WrongResult

        command = typer.main.get_command(app)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    try:
        code: int = command(standalone_mode=False) or 0
        return _fail("interrupted", code) if code == INTERRUPTED else code  # typer's own is silent
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except WrongResult as error:
        return _fail(str(error), 1)
    except OSError as error:  # such as a full disk; wrong files are found before the work
        return _fail(" ".join(str(error).split()), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors; which click depends on typer
            raise
        message = error.format_message()
        return _fail(message, 2) if message else 2  # help was shown instead of a message


def single(command: Callable[..., None]) -> typer.Typer:
    """A typer application of one command, for an entry point of its own."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def _fail(message: str, code: int) -> int:
    print(f"pykvcache: {message}", file=sys.stderr)
    return code
