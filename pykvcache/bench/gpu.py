"""Timing on a GPU: its own clock, cold caches, graph replay, and what it can do at most.

Nothing here runs without one; the functions mirror timing.py and peaks.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykvcache.bench.cases import Case
from pykvcache.bench.timing import Contender, Timing, interleave

if TYPE_CHECKING:
    from pykvcache.bench.tune.explain import CallSpec, Explanation

GEMM_SIZE = 8192
L2_FLUSH_BYTES = 256 * 2**20
WARM_CALLS = 3
PREFILL_VARIABLE = "PYKVCACHE_CUDA_PREFILL"


@functools.cache
def _flush_buffer(device: int) -> Tensor:
    return torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=f"cuda:{device}")


def elapsed(run: Contender, first: int, count: int) -> float:
    """Seconds of `count` calls by CUDA events; the L2 cache is flushed before each call.

    The events stand around the call alone, so the flush is not timed.
    """
    buffer = _flush_buffer(torch.cuda.current_device())
    pairs = []
    for call in range(first, first + count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        start.record()
        run(call)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sum(float(start.elapsed_time(end)) for start, end in pairs) * 1e-3


def as_graphs(run: Contender, copies: int) -> Contender:
    """One CUDA graph for each copy of the data; a call replays that of its number.

    `run` lives as long as the result: graphs know addresses and keep no tensor.
    """
    graphs: list[tuple[torch.cuda.CUDAGraph, Any, Contender]] = []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in range(min(copies, WARM_CALLS)):
            run(copy)
    torch.cuda.current_stream().wait_stream(side)
    for copy in range(copies):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(copy)
        graphs.append((graph, out, run))

    def replay(call: int) -> Any:
        graph, out, _ = graphs[call % copies]
        graph.replay()
        return out

    return replay


def copy_contender(total_bytes: int, device: torch.device) -> Contender:
    """A copy on the device that reads half of `total_bytes` and writes the other half."""
    source = torch.ones(max(1, total_bytes // 8), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def gemm_contender(dtype: torch.dtype, device: torch.device) -> Contender:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def with_wgmma(run: Contender) -> Contender:
    """`run` with prefill by the wgmma kernel of backend "cuda" (csrc/cuda/README.md)."""

    def call(number: int) -> Any:
        before = os.environ.get(PREFILL_VARIABLE)
        os.environ[PREFILL_VARIABLE] = "wgmma"
        try:
            return run(number)
        finally:
            if before is None:
                del os.environ[PREFILL_VARIABLE]
            else:
                os.environ[PREFILL_VARIABLE] = before

    return call


def peak_contenders(case: Case, device: torch.device) -> dict[str, Contender]:
    """For decode a copy of as many bytes as K and V have; for the rest a matrix multiply."""
    if case.phase == "decode":
        return {"copy": copy_contender(case.kv_bytes, device)}
    return {"gemm": gemm_contender(case.q_dtype, device)}


def copy_rate(timings: Mapping[str, Timing], case: Case) -> float:
    """Bytes a second, read and written, of the copy."""
    return case.kv_bytes / timings["copy"].median


def gemm_rate(timings: Mapping[str, Timing]) -> float:
    return 2 * float(GEMM_SIZE) ** 3 / timings["gemm"].median


def copy_bandwidth(total_bytes: int) -> float:
    """Bytes a second of a copy that moves this total, now."""
    device = torch.device("cuda")
    timings = interleave({"copy": copy_contender(total_bytes, device)}, 0.3, elapsed)
    return total_bytes / timings["copy"].median


def explain_on_gpu(
    spec: CallSpec,
    case: Case,
    seconds: float,
    backend: str = "auto",
    advance: Callable[..., object] = lambda steps=1, title=None: None,
) -> Explanation:
    """`tune.explain.explain` on the current GPU; "auto" is the best backend that is ready."""
    from pykvcache import ops
    from pykvcache.bench.kernels import Workload
    from pykvcache.bench.tune.explain import Explanation

    device = torch.device("cuda")
    backend = ops.table(backend, "cuda").backend
    advance(title="filling the pool")
    workload = Workload(case, [spec.block_size], [backend], "cuda")
    advance(title="checking")
    workload.check()
    advance(title="timing")
    name = f"paged {spec.block_size}"
    contenders = {
        name: workload.contenders[name],
        "copy": copy_contender(max(spec.bytes, 2**20), device),
        "gemm": gemm_contender(case.q_dtype, device),
    }
    timings = interleave(contenders, seconds, elapsed)
    kernel, launch = describe_launch(spec, device, backend)
    bandwidth = max(spec.bytes, 2**20) / timings["copy"].median
    rate, timing = gemm_rate(timings), timings[name]
    return Explanation(spec, backend, kernel, launch, bandwidth, rate, timing)


def describe_launch(
    spec: CallSpec, device: torch.device, backend: str
) -> tuple[str, dict[str, int]]:
    """Kernel and launch of a call on a GPU, as the launchers find them."""
    if backend == "cuda":
        return _describe_compiled(spec)
    from pykvcache.bench.tune.shapes import DTYPES
    from pykvcache.kernels.launch import attention, table

    arch = table.architecture(device)
    heads = spec.num_heads // spec.num_kv_heads
    split = attention.head_split(heads, spec.head_dim)
    group, groups = heads // split, spec.num_kv_heads * split
    rows = attention.decode_rows(group, spec.batch * groups, spec.query_len, False, device)
    decodes = spec.query_len * group <= rows
    phase = "decode" if decodes else "prefill"
    choice = table.choose(phase, arch, spec.head_dim, DTYPES[spec.dtype].itemsize)
    found = {"tile": choice.tile, "stages": choice.stages, "warps": choice.warps}
    if decodes:
        found["tile"] = table.decode_tile(arch, spec.head_dim)
        tiles = -(-spec.query_len * group // attention.row_tile(group))
        found["programs"] = table.decode_programs(device, groups * tiles)
    else:
        found["rows"] = choice.rows
    return f"{phase}_kernel (kernels/attention/{phase}.py), {arch}", found


def _describe_compiled(spec: CallSpec) -> tuple[str, dict[str, int]]:
    from pykvcache import _C_cuda
    from pykvcache.bench.tune.explain import DTYPE_NUMBERS

    dtype = DTYPE_NUMBERS[spec.dtype]
    (report,) = _C_cuda.explain_launch(
        dtype,
        dtype,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.block_size,
        [spec.length] * spec.batch,
        [spec.query_len] * spec.batch,
    )
    kernel = report.pop("kernel")
    return f"{kernel} (csrc/cuda/{kernel}.cuh)", {k: n for k, n in report.items() if n}
