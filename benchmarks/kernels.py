"""`python -m benchmarks.kernels`: paged attention beside torch SDPA on this machine.

GB/s of KV in decode and GFLOP/s in prefill, each as a share of the read bandwidth or the GEMM rate
of the same interleaved run; `speed-up` is over SDPA with folded heads (plain SDPA where nothing can
be folded). docs/measuring.md has the method.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pykvcache.bench import cases, environment, tables
from pykvcache.bench.kernels import Result, measure
from pykvcache.bench.progress import task_progress
from pykvcache.cli import run


def integers(text: str) -> list[int]:
    """ "1,2" -> [1, 2]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"must be positive integers with commas between, got {text!r}")
    return numbers


def chosen(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas between, all of them known."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{option} knows {', '.join(known)}, got {sorted(unknown)}")
    return names


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    threads: Annotated[str, typer.Option(help="Thread counts.")] = "1,2",
    block_sizes: Annotated[str, typer.Option(help="Block sizes.")] = "16,32,64",
    phases: Annotated[str, typer.Option(help="decode, prefill.")] = "decode,prefill",
    heads: Annotated[str, typer.Option(help="gqa (32/8 x 128), mha (16/16 x 64).")] = "gqa,mha",
    dtypes: Annotated[str, typer.Option(help="bf16, fp32.")] = "bf16,fp32",
    seconds: Annotated[float, typer.Option(help="Time for each case.")] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes.")] = False,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Also save; - = stdout.")] = None,
) -> None:
    """Time paged attention beside torch SDPA; figures of a wrong result are never shown."""
    selected = cases.select(
        chosen("--phases", phases, ("decode", "prefill")),
        chosen("--heads", heads, tuple(cases.HEADS)),
        chosen("--dtypes", dtypes, tuple(cases.DTYPES)),
        quick,
    )
    thread_counts, sizes = integers(threads), integers(block_sizes)
    console = tables.open_console(stderr=json == "-")
    console.print(tables.environment_line(environment.describe()), soft_wrap=True)
    results: list[Result] = []
    try:
        with task_progress("measuring", len(selected)) as advance:
            for case in selected:
                for result in measure(case, sizes, thread_counts, seconds):
                    results.append(result)
                advance()
    except KeyboardInterrupt:
        console.print("interrupted; what was measured so far:")
    for phase in ("decode", "prefill"):
        if of_phase := [result for result in results if result.case.phase == phase]:
            console.print(tables.kernel_table(of_phase), soft_wrap=True)
    if json is not None:
        tables.save_json(json, [result.to_json() for result in results])


if __name__ == "__main__":
    sys.exit(run(app))
