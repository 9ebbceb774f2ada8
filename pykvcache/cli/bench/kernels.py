"""`python -m pykvcache bench kernels`: paged attention beside its peers on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from pykvcache import operators, ops
from pykvcache.bench import cases, tables
from pykvcache.bench.kernels import Result, measure
from pykvcache.bench.peers import PEERS
from pykvcache.bench.progress import task_progress
from pykvcache.bench.tensors import check_memory
from pykvcache.bench.timing import WrongResult
from pykvcache.cli.bench.options import (
    MOST_THREADS,
    Compare,
    FailAbove,
    Json,
    Output,
    check_plot,
    check_seconds,
    chosen,
    integers,
)

NO_PEERS = "none"


def kernels(
    threads: Annotated[str, typer.Option(help="Thread counts (CPU).")] = "1,2",
    block_sizes: Annotated[str, typer.Option(help="Block sizes.")] = "16,32,64",
    phases: Annotated[str, typer.Option(help="decode, prefill.")] = "decode,prefill",
    heads: Annotated[
        str, typer.Option(help="gqa (32/8 x 128), gqa8 (32/4 x 128), mha (16/16 x 64).")
    ] = ",".join(cases.USUAL_HEADS),
    dtypes: Annotated[
        str, typer.Option(help="bf16, fp16, fp32, fp8 (of K and V; q is bf16).")
    ] = ",".join(cases.USUAL_DTYPES),
    rows: Annotated[
        str | None,
        typer.Option(metavar="ROWSxLENGTH,...", help="Instead: 32x4096,1x131072+31x4096."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each case.")] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda if there is one.")] = "auto",
    peers: Annotated[
        str,
        typer.Option(help="flex, sdpa-backends, flashinfer, transformers, all that run, or none."),
    ] = "all",
    wgmma: Annotated[
        bool, typer.Option("--wgmma", help="Also prefill by the wgmma kernel (Hopper).")
    ] = False,
    json: Json = None,
    compare: Compare = None,
    fail_above: FailAbove = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Roofline, GB/s by context, by block size.")
    ] = None,
) -> None:
    """Time paged attention beside torch SDPA and others; no figure of a wrong result is shown.

    GB/s of KV in decode and GFLOP/s in prefill, each also as a share of what the device did in the
    same interleaved run. docs/measuring.md has the method.
    """
    if quick and rows is not None:
        raise typer.BadParameter("--quick and --rows both choose sizes")
    try:
        selected = cases.select(
            chosen("--phases", phases, ("decode", "prefill")),
            chosen("--heads", heads, tuple(cases.HEADS)),
            chosen("--dtypes", dtypes, tuple(cases.DTYPES)),
            quick,
            () if rows is None else cases.read_rows(rows),
        )
    except ValueError as error:
        raise typer.BadParameter(f"--rows: {error}") from None
    check_seconds(seconds)
    thread_counts = integers("--threads", threads, MOST_THREADS)
    sizes = integers("--block-sizes", block_sizes)
    names = peer_names(peers)
    device, backends = choose_device(device)
    if wgmma:
        check_wgmma(backends)
    try:
        for case in selected:
            check_memory(case, sizes, device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if plot is not None:
        check_plot()
        make_folder(plot)
    output = Output(json, compare, fail_above)
    results: list[Result] = []
    missing: dict[str, str] = {}
    complete = True
    try:
        with task_progress("measuring", len(selected)) as advance:
            for case in selected:
                found = measure(
                    case, sizes, thread_counts, seconds, backends, device, names, missing, wgmma
                )
                for result in found:
                    results.append(result)
                advance(title=case.name)
    except WrongResult:
        output.save([result.to_json() for result in results])  # of the cases before it
        raise
    except KeyboardInterrupt:
        complete = False
        output.interrupted(results)
    for phase in ("decode", "prefill"):
        if of_phase := [result for result in results if result.case.phase == phase]:
            output.console.print(tables.kernel_table(of_phase), soft_wrap=True)
    for name, reason in missing.items():
        output.console.print(f"not measured: {name} {reason}", soft_wrap=True)
    if plot is not None and results:
        from pykvcache.bench.plots import plot_kernels

        for path in plot_kernels([result.to_json() for result in results], plot):
            output.console.print(f"plot: {path}")
    output.finish([result.to_json() for result in results], complete)


def make_folder(folder: Path) -> None:
    """Raise BadParameter if pictures could not be written there after all the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--plot: {folder} is no folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"--plot: folder {folder} cannot be written to")


def peer_names(peers: str) -> tuple[str, ...]:
    """Peers to try."""
    if peers in ("all", NO_PEERS):
        return tuple(PEERS) if peers == "all" else ()
    return chosen("--peers", peers, tuple(PEERS))


def choose_device(device: str) -> tuple[str, list[str]]:
    """The device, and the backends of ours that are ready for it."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no GPU")
    states = ops.backends()
    ours = [name for name in operators.AUTO_ORDER[device] if states[name] == "ready"]
    if not ours:
        first = operators.AUTO_ORDER[device][0]
        raise typer.BadParameter(f"no backend for {device}: {first} is {states[first]}")
    return device, ours


def check_wgmma(backends: list[str]) -> None:
    """Raise unless the wgmma kernel would be taken."""
    if "cuda" not in backends or torch.cuda.get_device_capability()[0] != 9:
        raise typer.BadParameter("--wgmma needs a Hopper GPU and backend cuda")
