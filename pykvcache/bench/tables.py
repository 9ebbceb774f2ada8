"""Results as rich tables and as JSON files; printing is the caller's."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pykvcache.bench import environment
from pykvcache.bench.kernels import Result

WIDTH_OF_A_FILE = 120


def open_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; a file or pipe gets lines that hold every table."""
    width = None if Console(stderr=stderr).is_terminal else WIDTH_OF_A_FILE
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def kernel_table(results: Sequence[Result]) -> Table:
    """Results of one phase: a line a contender, cases in groups."""
    decode = results[0].case.phase == "decode"
    unit = "GB/s of KV" if decode else "GFLOP/s"
    bandwidth = "read" if results[0].device == "cpu" else "copy"
    peak = f"% of {bandwidth}" if decode else "% of GEMM"
    table = Table(title=results[0].case.phase, title_justify="left", box=None, pad_edge=False)
    for column in ("heads", "dtype"):
        table.add_column(column)
    for column in ("B", "L", "threads"):
        table.add_column(column, justify="right")
    table.add_column("contender")
    for column in ("median us", "p10 us", unit, peak, "speed-up"):
        table.add_column(column, justify="right")
    for i, result in enumerate(results):
        case, timing = result.case, result.timing
        rates = (
            f"{result.rate / 1e9:.1f}",
            f"{100 * result.rate / result.peak:.0f}",
            f"{result.speedup:.2f}",
        )
        is_last = i + 1 == len(results) or results[i + 1].case != case
        table.add_row(
            case.heads.name,
            case.dtype_name,
            str(case.batch),
            case.length_name,
            str(result.threads),
            result.contender,
            f"{timing.median * 1e6:,.0f}",
            f"{timing.p10 * 1e6:,.0f}",
            *(rates if result.rate else ("", "", "")),
            end_section=is_last,
        )
    return table


def environment_line(found: dict[str, Any]) -> str:
    """The one line over every table: device, versions, commit, date."""
    versions = found["versions"]
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['cpu_isa']}; torch {versions['torch']}, "
        f"pykvcache {versions['pykvcache']} at {found['commit']}; {found['date']}"
    )


def save_json(path: str, results: Sequence[dict[str, Any]]) -> None:
    """Write {"environment", "results"} to a file, or to standard output when path is "-"."""
    text = json.dumps({"environment": environment.describe(), "results": list(results)}, indent=2)
    if path == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(path).write_text(text + "\n")
