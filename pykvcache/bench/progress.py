"""Progress bars with time left, on standard error and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def task_progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar of `total` steps; the yielded `advance(steps=1, title=None)` moves it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(steps: int = 1, title: str | None = None) -> None:
            bar.update(task, advance=steps, description=title)

        yield advance
