"""What the bench commands have in common: options, saving, comparing."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pykvcache.bench import environment, tables
from pykvcache.bench.compare import change_table, compare, read_results
from pykvcache.bench.replay.configs import config_file
from pykvcache.bench.replay.synthetic import SYNTHETIC
from pykvcache.bench.traces import TRACES

MOST_THREADS = 1024  # OpenMP dies of many more
PICTURES = (".png", ".svg", ".pdf", ".jpg")

Json = Annotated[str | None, typer.Option(metavar="FILE", help="Also save; - = standard output.")]
Compare = Annotated[
    str | None, typer.Option(metavar="FILE", help="Show what changed since that --json file.")
]
FailAbove = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="With --compare: exit code 1 if new / old is above this."),
]


class Output:
    """Where a command prints and saves; made before any work, so that wrong files are found first.

    Raises:
        typer.BadParameter: a file cannot be read or written.
    """

    def __init__(
        self,
        json: str | None,
        compare_with: str | None = None,
        fail_above: float | None = None,
    ) -> None:
        self._json, self._fail_above = json, fail_above
        if fail_above is not None and compare_with is None:
            raise typer.BadParameter("--fail-above needs --compare")
        if fail_above is not None and not 0 < fail_above < math.inf:
            raise typer.BadParameter(f"--fail-above must be more than 0, got {fail_above}")
        if json is not None and json != "-":
            check_output("--json", json)
        try:
            self._old = None if compare_with is None else read_results(compare_with)
        except ValueError as error:
            raise typer.BadParameter(f"--compare: {error}") from error
        self.console: Console = tables.open_console(stderr=json == "-")
        line = tables.environment_line(environment.describe())
        self.console.print(line, soft_wrap=True)

    def interrupted(self, found: object) -> None:
        """Say it, and whether anything comes."""
        what = "what was measured so far:" if found else "nothing was measured yet"
        self.console.print(f"interrupted; {what}")

    def finish(self, rows: Sequence[dict[str, Any]], complete: bool = True) -> None:
        """Save and compare; exit code 1 beyond --fail-above or with nothing to compare, 130 after
        Ctrl-C.
        """
        self.save(rows)
        is_slower = self._old is not None and bool(rows) and self._compare(rows)
        if not complete:
            raise typer.Abort
        if is_slower:
            raise typer.Exit(1)

    def save(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the file of --json, if there is one."""
        if self._json == "-" or (self._json is not None and rows):  # no old file becomes empty
            tables.save_json(self._json, rows)

    def _compare(self, rows: Sequence[dict[str, Any]]) -> bool:
        assert self._old is not None
        new = {"environment": environment.describe(), "results": list(rows)}
        found = compare(self._old, new)
        for warning in found.warnings:
            self.console.print(f"warning: other device, ratios mean little: {warning}")
        if not found.changes:
            self.console.print("warning: nothing in the old file was measured now")
            if self._fail_above is not None:
                self.console.print("so --fail-above has nothing to judge by: exit code 1")
        else:
            self.console.print(change_table(found), soft_wrap=True)
        for word, names in (("not measured now", found.gone), ("new", found.added)):
            if names:
                self.console.print(f"{word}: {len(names)}", style="dim")
        if self._fail_above is None:
            return False
        return not found.changes or found.worst > self._fail_above


def check_output(option: str, file: str | Path) -> None:
    """Raise BadParameter if a file could not be written after all the work."""
    if not str(file):
        raise typer.BadParameter(f"{option} needs the name of a file")
    path = Path(file).absolute()
    try:
        if not path.parent.is_dir():
            raise typer.BadParameter(f"{option}: there is no folder {path.parent}")
        if path.is_dir():
            raise typer.BadParameter(f"{option}: {path} is a folder")
        if not path.exists():
            path = Path(os.path.realpath(path))  # of a link that leads nowhere yet
            path.open("x").close()
            path.unlink()
        elif not os.access(path, os.W_OK):
            raise typer.BadParameter(f"{option}: {path} cannot be written")
    except OSError as error:
        raise typer.BadParameter(f"{option}: {path} cannot be written: {error.strerror}") from None


def check_apart(option: str, file: str | Path, others: Mapping[str, str | Path | None]) -> None:
    """Raise BadParameter if `file` is also what another option names."""
    for other, name in others.items():
        if name is None:
            continue
        if os.path.isfile(file) and os.path.isfile(name):
            is_same = os.path.samefile(file, name)
        else:  # a terminal or a pipe takes both
            is_new = not os.path.exists(file)
            is_same = is_new and os.path.realpath(file) == os.path.realpath(name)
        if is_same:
            raise typer.BadParameter(f"{option} and {other} are the same file, {file}")


def check_results(inputs: Mapping[str, str | Path | None], **results: str | Path | None) -> None:
    """Raise BadParameter if a result would be written over an input, or over another result."""
    files = dict(inputs)
    for name, file in results.items():
        if file is not None and file != "-":
            check_apart(f"--{name}", file, files)
            files[f"--{name}"] = file


def input_files(trace: str, model_config: str | None = None) -> dict[str, str | Path | None]:
    """The files that are read: a trace and a config of the user's own."""
    files: dict[str, str | Path | None] = {}
    if trace not in (*TRACES, *SYNTHETIC):
        files["--trace"] = trace
    if model_config and os.path.exists(model_config):
        files["--model-config"] = config_file(model_config)
    return files


def check_picture(file: Path, option: str = "--plot") -> None:
    """Raise BadParameter if a picture could not be drawn or written after all the work."""
    check_plot(option)
    if file.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{option} must end in {', '.join(PICTURES)}, got {file.name!r}")
    check_output(option, file)


def check_plot(option: str = "--plot") -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter(f"{option} needs matplotlib: pip install 'pykvcache[plot]'")


def check_transformers(command: str) -> None:
    """Raise BadParameter if a command that runs models cannot."""
    if importlib.util.find_spec("transformers") is None:
        raise typer.BadParameter(f"{command} needs transformers: pip install 'pykvcache[hf]'")


def check_seconds(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise typer.BadParameter(f"--seconds must be more than 0, got {seconds}")


def integers(option: str, text: str, most: int | None = None) -> list[int]:
    """ "1,2" -> [1, 2]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(
            f"{option} must be positive integers with commas between, got {text!r}"
        )
    if most is not None and max(numbers) > most:
        raise typer.BadParameter(f"{option} must be {most:,} at most, got {max(numbers):,}")
    return numbers


def chosen(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between, all of them known."""
    names = tuple(part.strip() for part in text.split(","))
    if unknown := sorted(set(names) - set(known)):
        raise typer.BadParameter(
            f"{option} knows {', '.join(known)}, got {', '.join(map(repr, unknown))}"
        )
    return names
