"""What the kernels cost, counted without a GPU: docs/measuring.md says how to read it.

python tests/ptx_machine/report.py [--backend triton|cuda] [--arch sm_80|sm_90|sm_90a]
                                    [--only WORDS] [--json FILE] [--lines]
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is when unset, without a warning
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS.parent)]  # without this folder

import torch  # noqa: E402
import typer  # noqa: E402
from op_cases import BF16, Case, build  # noqa: E402
from ptx_machine import cost  # noqa: E402
from ptx_machine.counts import Counts, Traffic, total  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from pykvcache import operators, ops  # noqa: E402

FP8 = torch.float8_e4m3fn
TOKENS = 640  # of the sequence that decode reads


@dataclass(frozen=True)
class Job:
    """A call of an operator."""

    name: str
    call: Callable[[str], object]  # takes the backend


def attention_job(case: Case) -> Job:
    def call(backend: str) -> object:
        data = build(case)
        return ops.paged_attention(*data.args, **data.kwargs, backend=backend)

    return Job(case.name, call)


def attention_jobs() -> Iterator[Job]:
    for cache, scales in ((None, ""), (FP8, "head")):
        for dim in (128, 64):
            for block_size, group in ((16, 8), (16, 4), (16, 1), (1, 8), (64, 8)):
                name = f"decode {'fp8' if cache else 'bf16'} D{dim} block {block_size} G{group}"
                yield attention_job(
                    Case(name, ((1, TOKENS),), group, 1, dim, block_size=block_size, dtype=BF16,
                         cache_dtype=cache, scales=scales)
                )  # fmt: skip
    rows = ((160, 288),)
    yield attention_job(Case("prefill bf16 D128 block 16 G4", rows, 4, 1, 128, dtype=BF16))


def cache_jobs() -> Iterator[Job]:
    tokens, heads, dim, size = 48, 2, 128, 16
    x = torch.randn(tokens, heads, dim).to(BF16)
    slots = torch.randperm(128)[:tokens]
    table = torch.randperm(8)[:6].int().view(2, 3)
    lengths, starts = torch.tensor([40, 33]).int(), torch.tensor([0, 40, 73]).int()

    def pool(dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.zeros(8, heads, size, dim, dtype=dtype)

    scale = torch.ones(heads)
    yield Job(
        "write_kv bf16",
        lambda backend: ops.write_kv(x, x, pool(), pool(), slots, backend=backend),
    )
    yield Job(
        "write_kv fp8",
        lambda backend: ops.write_kv(
            x, x, pool(FP8), pool(FP8), slots, k_scale=scale, v_scale=scale, backend=backend
        ),
    )
    pairs = torch.tensor([[0, 1], [2, 3]])
    yield Job(
        "copy_blocks", lambda backend: ops.copy_blocks([pool()], [pool()], pairs, backend=backend)
    )
    yield Job(
        "gather_kv",
        lambda backend: ops.gather_kv(pool(), pool(), table, lengths, starts, 73, backend=backend),
    )
    outs, lses = torch.randn(3, 8, heads, dim).to(BF16), torch.randn(3, 8, heads)
    yield Job("merge_states", lambda backend: ops.merge_states(outs, lses, backend=backend))


@dataclass
class Row:
    """A kernel in a call."""

    call: str
    kernel: str
    load_sectors: float | None  # least over touched; None: reads nothing
    load_width: float  # bytes of a thread, mean over requests
    store_sectors: float | None
    worst_global: str
    bank_passes: float | None  # touched over least
    worst_shared: str
    issued: int  # warp instructions of the PTX, without moves
    registers: int
    spilled: int
    ctas: int  # of a processor
    flight_kib: float  # of a processor, at most
    pass_issued: int = 0
    pass_bytes: int = 0
    issue_share: float | None = None  # of the cycles that the bytes of a pass take
    special_share: float | None = None
    product_share: float | None = None
    product_limit: float | None = None  # of the products' rate, if nothing but issue slots limits


def ratio(of: int, to: int) -> float | None:
    return of / to if to else None


def worst(counts: Counts, *kinds: dict[int, Traffic]) -> str:
    every = {index: t for kind in kinds for index, t in kind.items()}
    found = counts.worst(every)
    if found is None:
        return ""
    index, traffic = found
    return f"{counts.source(index)} {traffic.moved}/{traffic.least} {traffic.width} B"


def row_of(call: str, kernel: str, run: cost.Run, made: cost.Compiled) -> Row:
    counts, machine = run.counts, run.counts.machine
    loads, stores, shared = (total(t) for t in (counts.loads, counts.stores, counts.shared))
    widths = sum(t.width * t.requests for t in counts.loads.values())
    classes = counts.by_class()
    ctas = made.resident(machine.threads, machine.shared_bytes)
    row = Row(
        call, kernel, ratio(loads.least, loads.moved), widths / max(loads.requests, 1),
        ratio(stores.least, stores.moved), worst(counts, counts.loads, counts.stores),
        ratio(shared.moved, shared.least), worst(counts, counts.shared),
        sum(classes.values()) - classes["move"], made.registers, made.spilled, ctas,
        counts.in_flight[1] * ctas / 1024,
    )  # fmt: skip
    if made.hot is not None:
        row.pass_issued, row.pass_bytes = made.hot.issued, made.hot.copied_bytes
        spent = cost.cycles(made.hot)
        row.product_limit = spent.products / spent.issue
        if spent.memory:
            row.issue_share, row.special_share, row.product_share = (
                each / spent.memory for each in (spent.issue, spent.special, spent.products)
            )
    return row


def assembler(driver: Any, arch: str) -> str:
    """The ptxas that makes this backend's machine code."""
    if hasattr(driver, "find_nvcc"):
        return str(Path(driver.find_nvcc()[0]).parent / "ptxas")
    compiler = importlib.import_module("triton.backends.nvidia.compiler")
    return str(compiler.get_ptxas(int(arch.removeprefix("sm_"))).path)


def disassembler() -> str | None:
    """Triton brings one; None if there is none."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return shutil.which("nvdisasm")
    return str(Path(found.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm")


def readable(driver: Any, name: str) -> str:
    if not hasattr(driver, "demangled"):
        return name
    found = driver.KERNEL.search(driver.demangled(name))
    return str(found[1]).replace("pykvcache::cuda::", "") if found else name


def forget(driver: Any) -> None:
    if hasattr(driver, "machine_for"):
        driver.machine_for.cache_clear()
    else:
        driver.Launches.machines.clear()


def measured(backend: str, arch: str, jobs: list[Job]) -> Iterator[Row]:
    operators.LOADERS["cuda"] = lambda: "not on this machine"
    driver = importlib.import_module(f"ptx_machine.{backend}_driver")
    driver.load()
    ptxas, nvdisasm = assembler(driver, arch), disassembler()
    known: dict[tuple[str, str], cost.Compiled] = {}
    for job in track(jobs, "calls", console=Console(stderr=True)):
        with (
            driver.playing(arch),
            cost.noted(driver, functools.partial(forget, driver)) as runs,
        ):
            job.call(backend)
        for run in runs:
            if run.counts.ctas == 0:
                continue
            key = run.name, run.text
            if key not in known:
                known[key] = cost.compiled(run.text, run.name, ptxas, nvdisasm)
            yield row_of(job.name, readable(driver, run.name), run, known[key])


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def table_of(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    heads = (
        "call", "kernel", "loads %", "B", "stores %", "worst line of global memory", "banks x",
        "worst line of shared memory", "regs", "CTAs", "KiB in flight", "pass: issued / bytes",
        "issue %", "special %", "mma %", "mma limit %",
    )  # fmt: skip
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        hot = f"{row.pass_issued} / {row.pass_bytes}" if row.pass_issued else ""
        table.add_row(
            row.call, row.kernel, percent(row.load_sectors), f"{row.load_width:.0f}",
            percent(row.store_sectors), row.worst_global,
            "" if row.bank_passes is None else f"{row.bank_passes:.2f}", row.worst_shared,
            f"{row.registers}{' SPILLS' * bool(row.spilled)}", str(row.ctas),
            f"{row.flight_kib:.0f}", hot, percent(row.issue_share), percent(row.special_share),
            percent(row.product_share), percent(row.product_limit),
        )  # fmt: skip
    return table


def main(
    backend: Annotated[str, typer.Option(help="triton or cuda")] = "triton",
    arch: Annotated[str, typer.Option(help="sm_80, sm_90 or sm_90a")] = "sm_90",
    only: Annotated[str, typer.Option(help="calls whose name has this in it")] = "",
    kernel: Annotated[str, typer.Option(help="kernels whose name has this in it")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows there")] = None,
) -> None:
    """Count what the kernels of a backend do, and what that is of an H100's rates."""
    jobs = [j for j in (*attention_jobs(), *cache_jobs()) if only in j.name]
    rows = [row for row in measured(backend, arch, jobs) if kernel in row.kernel]
    Console(width=None if sys.stdout.isatty() else 240).print(table_of(rows, f"{backend}, {arch}"))
    if json_file is not None:
        json_file.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    typer.run(main)
