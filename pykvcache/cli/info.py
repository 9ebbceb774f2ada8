"""`python -m pykvcache info`: versions, device, and which backends can be used."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pykvcache.bench import environment


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, the device, and each backend: ready, or why not."""
    found = environment.describe()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console(soft_wrap=True, markup=False, emoji=False).print(info_table(found))


def info_table(found: dict[str, Any]) -> Table:
    """`environment.describe()` as two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for package, version in found["versions"].items():
        table.add_row(package, version or "not installed")
    table.add_row("system", found["system"])
    table.add_row("cpu", f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads")
    table.add_row("instructions", found["cpu_isa"] or "none: the CPU kernels are not loaded")
    for gpu in found["gpus"]:
        table.add_row("gpu", gpu)
    for backend, status in found["backends"].items():
        table.add_row(f"backend {backend}", status)
    return table
