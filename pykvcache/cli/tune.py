"""`python -m pykvcache tune`: a block size and a launch table for a model, a trace, this device."""

from __future__ import annotations

import json as json_module
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from pykvcache import launch_table
from pykvcache.bench import environment, tables
from pykvcache.bench.progress import task_progress
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.tune.explain import EXPLAIN_STEPS, CallSpec
from pykvcache.bench.tune.explain import explain as explain_call
from pykvcache.bench.tune.measure import limits_of_calls, section_name
from pykvcache.bench.tune.objective import Demand
from pykvcache.bench.tune.plan import (
    BLOCK_SIZES,
    Interrupted,
    Request,
    Tuning,
    progress_steps,
    restore_launches,
)
from pykvcache.bench.tune.plan import tune as run_tuning
from pykvcache.bench.tune.report import demand_table, reasons, tuning_table
from pykvcache.bench.tune.search import LITTLE_WASTE
from pykvcache.bench.tune.shapes import load_shape
from pykvcache.cli.bench.kernels import choose_device
from pykvcache.cli.bench.options import (
    MOST_THREADS,
    check_output,
    check_picture,
    check_results,
    input_files,
    integers,
)

STANDARD_OUTPUT = "-"


def tune(
    model_config: Annotated[
        str, typer.Option(help="A known model or a config.json.")
    ] = "llama-3.1-8b",
    trace: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A packaged or synthetic trace, CSV or JSONL.")
    ] = "azure-conv",
    dtype: Annotated[str, typer.Option(help="Of the cache: bf16, fp16 or fp32.")] = "bf16",
    block_sizes: Annotated[str, typer.Option(help="Candidates.")] = ",".join(map(str, BLOCK_SIZES)),
    memory: Annotated[str, typer.Option(help="Of the KV cache, such as 8GiB.")] = "8GiB",
    requests: Annotated[int, typer.Option(min=1, help="Of the trace, at most.")] = 2000,
    max_len: Annotated[int | None, typer.Option(help="Longest prompt + output.")] = None,
    seconds: Annotated[float, typer.Option(help="For the race between candidates.")] = 60.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads; torch's number.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Percent of tokens/s that count as equal.")
    ] = 3.0,
    little_waste: Annotated[
        float,
        typer.Option(help="Of equal ones the largest that wastes at most this percent is taken."),
    ] = LITTLE_WASTE,
    step_ms: Annotated[
        float | None, typer.Option(help="Cost of a step beside attention; reading the weights.")
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure every candidate to the end.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda if there is one.")] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto, cpu, triton or cuda; on a GPU only triton takes a table.")
    ] = "auto",
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Launch table; the user's. - = standard output."),
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also save a row a block size; - = stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw speed against waste.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="CALL",
            help="Explain a call: B=8,L=4096,HQ=32,HKV=8,D=128,block_size=16,dtype=bf16,q=1.",
        ),
    ] = None,
) -> None:
    """Measure the kernels, replay the trace, and recommend one block size with its reasons.

    Writes the launch table that the kernels read (docs/tuning.md). --explain says for one call
    which kernel and launch run, the bytes and FLOPs, the floor and what was achieved.
    """
    device, ready = choose_device(device)
    if backend not in ("auto", *ready):
        known = ", ".join(("auto", *ready))
        raise typer.BadParameter(f"--backend must be one of {known} on {device}, got {backend!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if explain is not None:
            if exhaustive:
                raise ValueError("--explain explains one call; --exhaustive is for a tuning run")
            show_explanation(CallSpec.parse(explain), device, json, backend)
            return
        path = check_files(out, json, plot)
        check_results(input_files(trace, model_config), out=path, json=json, plot=plot)
        if not 0 <= tolerance < 50:
            raise ValueError(f"tolerance must be 0 to 50 percent, got {tolerance}")
        if not 0 <= little_waste <= 100:
            raise ValueError(f"little_waste must be 0 to 100 percent, got {little_waste}")
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be more than 0, got {seconds}")
        if step_ms is not None and not 0 <= step_ms < math.inf:
            raise ValueError(f"step_ms must be 0 or more, got {step_ms}")
        request = Request(
            load_shape(model_config, dtype),
            Workload(trace, max_len, requests),
            memory,
            sorted(set(integers("--block-sizes", block_sizes))),
            seconds,
            tolerance / 100,
            little_waste,
            None if step_ms is None else step_ms / 1e3,
            device,
            exhaustive,
            backend,
        )
        console = tables.open_console(stderr=STANDARD_OUTPUT in (out, json))
        console.print(tables.environment_line(environment.describe()), soft_wrap=True)
        with task_progress("tuning", progress_steps(request)) as advance:
            found = run_tuning(request, advance)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(" ".join(str(error).split())) from error
    except Interrupted as stop:
        save_demands(console, stop.demands, json)
        raise typer.Abort from None
    if found.interrupted:
        console.print("interrupted; what was measured so far:")
    show(console, found)
    save(console, found, path, json, plot)
    if found.interrupted:
        raise typer.Abort


def check_files(out: str | None, json: str | None, plot: Path | None) -> Path | None:
    """The launch table's file, None for standard output; raises before any work is done."""
    if STANDARD_OUTPUT == out == json:
        raise ValueError("--out and --json cannot both go to standard output")
    if json is not None and json != STANDARD_OUTPUT:
        check_output("--json", json)
    if plot is not None:
        check_picture(plot)
    if out == STANDARD_OUTPUT:
        return None
    if out is not None:
        check_output("--out", out)
        if Path(out).exists():
            launch_table.read_table(out)  # what is no launch table is not written over
        return Path(out)
    path = launch_table.user_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output("launch table (--out chooses another)", path)
    return path


def show(console: Console, found: Tuning) -> None:
    console.print(tuning_table(found), soft_wrap=True)
    for line in reasons(found):
        console.print(line, soft_wrap=True)


def save(
    console: Console, found: Tuning, path: Path | None, json: str | None, plot: Path | None
) -> None:
    """Write the launch table, the rows and the picture."""
    if found.interrupted:
        console.print("launch table: not written, the kernels were not compared to the end")
    elif path is None:
        sys.stdout.write(json_module.dumps(merge(found, {}), indent=2) + "\n")
    else:
        console.print(f"launch table: {write_table(found, path)}", soft_wrap=True)
    if json is not None:
        tables.save_json(json, found.to_json())
    if plot is not None:
        from pykvcache.bench.tune.plots import plot_tuning

        plot_tuning(found, plot)
        console.print(f"plot: {plot}")


def save_demands(console: Console, demands: Mapping[int, Demand], json: str | None) -> None:
    """What the replay had found when Ctrl-C came."""
    if demands:
        console.print("interrupted before the kernels were compared; the replay found:")
        console.print(demand_table(demands))
    else:
        console.print("interrupted before anything was found")
    if json is not None:
        rows = [asdict(demand) | {"interrupted": True} for demand in demands.values()]
        tables.save_json(json, rows)


def merge(found: Tuning, old: launch_table.Table) -> launch_table.Table:
    """`old` with what was found: what it said about the measured calls goes."""
    if found.backend == "cuda":
        return old
    section = section_name(torch.device(found.request.device))
    new = dict(found.table.get(section, {}))
    if section == "cpu":
        new["device"] = launch_table.processor()
    measured = limits_of_calls(found.request.shape, section)
    return launch_table.merge_section(old, section, new, measured)


def write_table(found: Tuning, path: Path) -> str:
    """Bring the file up to date; what was done, in words."""
    old, words = old_table(path)
    merged = merge(found, old)
    if found.backend == "cuda":
        return "not written, the cuda kernels choose their launches themselves"
    if merged == old:
        kept = "stays as it is" if path.exists() else "is not written"
        return f"{path} {kept}, the kernels' own choices were best"
    merged["about"] = {
        "written_by": "python -m pykvcache tune",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": found.request.shape.name,
        "block_size": found.outcome.block_size,
    }
    if words:
        path.replace(path.with_suffix(".old"))
    path.write_text(json_module.dumps(merged, indent=2) + "\n")
    restore_launches(torch.device(found.request.device))  # this process reads it as well
    if not found.table:
        words += "; the kernels' own choices were best, older entries for these calls are gone"
    before = old.get("cpu", {}).get("device")
    if "cpu" in found.request.device and before not in (None, launch_table.processor()):
        words += f"; entries of another processor ({before}) are gone"
    return f"{path}, {who_reads(path)}{words}"


def old_table(path: Path) -> tuple[launch_table.Table, str]:
    """The table in a file, and what is to be said about it if it is broken."""
    if not path.exists():
        return {}, ""
    try:
        return launch_table.read_table(path), ""
    except ValueError as error:
        return {}, f"; the old one was broken and is now {path.with_suffix('.old').name} ({error})"


def who_reads(path: Path) -> str:
    """Which processes read this launch table."""
    named = os.environ.get(launch_table.VARIABLE)
    if named and named != launch_table.NO_TABLE and Path(named).absolute() == path.absolute():
        return f"read while {launch_table.VARIABLE} names it"
    if path != launch_table.user_path():
        return f"read when {launch_table.VARIABLE} names it"
    if named:
        return f"not read while {launch_table.VARIABLE} is {named}"
    return "read by every process from now on"


def show_explanation(spec: CallSpec, device: str, json: str | None, backend: str) -> None:
    console = tables.open_console(stderr=json == STANDARD_OUTPUT)
    try:
        with task_progress("explaining", EXPLAIN_STEPS) as advance:
            found = explain_call(spec, device=device, backend=backend, advance=advance)
    except KeyboardInterrupt:
        console.print("interrupted before the end; nothing is kept of one call")
        if json == STANDARD_OUTPUT:
            tables.save_json(json, [])
        raise typer.Abort from None
    for name, text in [*found.lines(), ("launch table", used_table())]:
        console.print(f"{name:14}{text}", soft_wrap=True)
    rows: list[dict[str, Any]] = [found.to_json()]
    if json is not None:
        tables.save_json(json, rows)


def used_table() -> str:
    """Which launch table this process reads."""
    try:
        found, path = launch_table.find_user_table()
    except ValueError as error:
        return f"none; {error}"
    if path is None:
        return "none; the kernels' own choices"
    device = found.get("cpu", {}).get("device")
    if device is not None and device != launch_table.processor():
        return f"{path}, of another processor ({device}): its CPU section is not used"
    return str(path)
