"""Times one layer's attention of one candidate, on the CPU or a GPU, with cold caches.

All block sizes share one storage, seen as blocks of the size in question and reached through a
shuffled block table, so memory does not grow with the number of candidates. Each call touches other
blocks until the storage has gone by. A candidate's launch is put into the launch table of the
process just before its sample: what is timed is what the table will do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pykvcache import launch_table, ops
from pykvcache.bench.timing import WrongResult
from pykvcache.bench.tune.explain import CallSpec, cpu_report
from pykvcache.bench.tune.search import DEFAULT, Candidate, Launch
from pykvcache.bench.tune.shapes import Shape
from pykvcache.storage import allocate

COLD_BYTES = 256 * 2**20  # of tokens that are read before a call comes to the same ones again
MOST_STORAGE_BYTES = 4 * COLD_BYTES
CALL_BYTES = 40 * 2**20
MIN_SAMPLE_SECONDS = 3e-3
CHECKED_TOKENS = 100
PREFILL_TOKENS = 1024


@dataclass
class Call:
    """Arguments of `ops.paged_attention` over several block tables [copies, B, blocks]."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    query_len: int
    backend: str

    def run(self, number: int) -> Tensor:
        out, _ = ops.paged_attention(
            self.q,
            *self.caches,
            self.tables[number % len(self.tables)],
            self.seq_lens,
            self.cu_seqlens_q,
            self.query_len,
            backend=self.backend,
        )
        return out

    @property
    def cached_tokens(self) -> int:
        return int(self.seq_lens.sum())


class Bench:
    """Calls of one shape on one device, made when they are first asked for.

    Args:
        lengths: cached tokens of the rows of a decode call.
        prompt: length of the prompt of a prefill call.
        backend: "cpu", "triton" or "cuda"; the last takes no launches.
        block_size: the largest; rows are as many as fit in whole blocks of it.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: Sequence[int],
        prompt: int,
        device: str = "cpu",
        backend: str = "cpu",
        block_size: int = 1,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.backend = backend
        self.lengths = fit_lengths(
            lengths,
            CALL_BYTES // shape.token_bytes,
            MOST_STORAGE_BYTES // (shape.token_bytes * block_size),
            block_size,
        )
        self.prompt = min(prompt, PREFILL_TOKENS)
        generator = torch.Generator().manual_seed(0)
        needed = [storage_bytes(rows, block_size) for rows in (self.lengths, [self.prompt])]
        elements = max(needed) // shape.torch_dtype.itemsize
        base = torch.randn(2**20, generator=generator).to(shape.torch_dtype)
        self.storage = allocate(1, elements, shape.torch_dtype, self.device)[0]
        for part in self.storage.split(base.numel()):
            part.copy_(base[: part.numel()])
        self._generator = generator
        self._calls: dict[tuple[str, int], Call] = {}
        self._numbers: dict[tuple[str, int], int] = {}
        self._per_sample: dict[tuple[str, int], int] = {}

    def decode(self, candidate: Candidate) -> float:
        """Seconds for one cached token."""
        self._use(candidate.launch)
        call = self._call("decode", candidate.block_size)
        return self._sample("decode", candidate.block_size) / call.cached_tokens

    def prefill(self, block_size: int, rows: int = 0) -> float:
        """Seconds for one prompt token."""
        self._use(DEFAULT, rows)
        return self._sample("prefill", block_size) / self.prompt

    def prefill_items(self, block_size: int, rows: int) -> tuple[int, int]:
        """What `rows` make of the prompt on a CPU: queries of an item, and items."""
        self._use(DEFAULT, rows)
        shape, prompt = self.shape, self.prompt
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        report = cpu_report(CallSpec(1, prompt, *heads, block_size, prompt, shape.dtype))
        return min(report["query_tile"], prompt), report["items"]

    def check(self, candidates: Sequence[Candidate], rows: Sequence[int] = (0,)) -> None:
        """Raise WrongResult unless every launch gives the reference's result on short rows."""
        for candidate in candidates:
            self._use(candidate.launch)
            self._check("decode", candidate.block_size, str(candidate))
        for size in sorted({candidate.block_size for candidate in candidates}):
            for count in rows:
                self._use(DEFAULT, count)
                self._check("prefill", size, f"prefill of {count} rows, blocks of {size}")

    def _use(self, launch: Launch, rows: int = 0) -> None:
        if self.backend != "cuda":
            use_launch(self.shape, launch, rows, self.device)

    def _check(self, phase: str, block_size: int, name: str) -> None:
        lengths = [1, 37, CHECKED_TOKENS] if phase == "decode" else [CHECKED_TOKENS]
        call = self._make(phase, block_size, lengths, copies=1)
        out = call.run(0).float().cpu()
        used = int(call.tables.max()) + 1
        k_cache, v_cache = (cache[:used].float().cpu() for cache in call.caches)
        expected, _ = ops.paged_attention(
            call.q.float().cpu(),
            k_cache,
            v_cache,
            call.tables[0].cpu(),
            call.seq_lens.cpu(),
            call.cu_seqlens_q.cpu(),
            call.query_len,
            backend="reference",
        )
        error = (out - expected).abs().max().item()
        allowed = 8 * torch.finfo(self.shape.torch_dtype).eps * expected.abs().max().item()
        if not error <= allowed:
            raise WrongResult(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")

    def _call(self, phase: str, block_size: int) -> Call:
        key = phase, block_size
        if key not in self._calls:
            lengths = self.lengths if phase == "decode" else [self.prompt]
            self._calls[key] = self._make(phase, block_size, lengths)
            self._numbers[key] = 0
            self._per_sample[key] = self._count_calls(self._calls[key])
        return self._calls[key]

    def _make(
        self, phase: str, block_size: int, lengths: Sequence[int], copies: int | None = None
    ) -> Call:
        shape = self.shape
        block = (shape.num_kv_heads, block_size, shape.head_dim)
        width = 2 * shape.num_kv_heads * block_size * shape.head_dim
        count = self.storage.numel() // width
        pool = self.storage[: count * width].view(count, 2, *block)
        needed = [-(-length // block_size) for length in lengths]
        if copies is None:
            copies = max(1, count // sum(needed))
        if sum(needed) > count:
            raise ValueError(
                f"blocks of {block_size} tokens do not fit {self.storage.nbytes} bytes"
            )
        few = count if copies > 1 else sum(needed)
        order = torch.randperm(few, generator=self._generator, dtype=torch.int32)
        tables = torch.full((copies, len(lengths), max(needed)), -1, dtype=torch.int32)
        at = 0
        for copy in range(copies):
            for row, blocks in enumerate(needed):
                tables[copy, row, :blocks] = order[at : at + blocks]
                at += blocks
        query_len = 1 if phase == "decode" else lengths[0]
        tokens = len(lengths) * query_len
        q = torch.randn(tokens, shape.num_heads, shape.head_dim, generator=self._generator)
        starts = torch.arange(len(lengths) + 1, dtype=torch.int32) * query_len
        there = self.device
        return Call(
            q.to(shape.torch_dtype).to(there),
            (pool[:, 0], pool[:, 1]),
            tables.to(there),
            torch.tensor(lengths, dtype=torch.int32, device=there),
            starts.to(there),
            query_len,
            self.backend,
        )

    def _sample(self, phase: str, block_size: int) -> float:
        call, key = self._call(phase, block_size), (phase, block_size)
        count, number = self._per_sample[key], self._numbers[key]
        self._numbers[key] += count
        if self.device.type == "cuda":
            call.run(number)  # a launch that is new to this process is compiled here
        return elapsed(lambda i: call.run(number + i), count, self.device)

    def _count_calls(self, call: Call) -> int:
        """Calls that fill a sample; also warms up."""
        call.run(0)
        single = elapsed(call.run, 1, self.device)
        return max(1, round(MIN_SAMPLE_SECONDS / max(single, 1e-7)))


def elapsed(run: Callable[[int], Any], count: int, device: torch.device) -> float:
    """Mean seconds of `count` calls.

    By events on a GPU. On one thread of a CPU by the thread's own clock, which stands still while
    something else has the core; on several by the wall clock.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(count):
            run(i)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / count
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for i in range(count):
        run(i)
    return (clock() - begin) / count


def storage_bytes(lengths: Sequence[int], block_size: int) -> int:
    """So many that rows of these lengths in blocks of that size hold COLD_BYTES of tokens.

    Short rows leave most of a large block untouched: a pool of COLD_BYTES would stay in the caches.
    """
    held = sum(-(-length // block_size) * block_size for length in lengths)
    return min(MOST_STORAGE_BYTES, COLD_BYTES * held // max(1, sum(lengths)))


def fit_lengths(lengths: Sequence[int], tokens: int, blocks: int, block_size: int) -> list[int]:
    """Some of the lengths, evenly spaced in size, of `tokens` and `blocks` at most together."""
    ordered = sorted(lengths)
    count = max(1, min(len(ordered), int(tokens / (sum(ordered) / len(ordered)))))
    while True:
        middles = [(2 * i + 1) * len(ordered) // (2 * count) for i in range(count)]
        chosen = [ordered[i] for i in middles]
        held = sum(-(-length // block_size) for length in chosen)
        if (sum(chosen) <= tokens and held <= blocks) or count == 1:
            return [min(length, tokens) for length in chosen]
        count -= 1


def use_launch(
    shape: Shape, launch: Launch, rows: int = 0, device: torch.device | None = None
) -> None:
    """Make the kernels of this process run calls of this shape with these parameters."""
    table = table_of(shape, launch, rows, section_name(device))
    if device is None or device.type == "cpu":
        launch_table.use_on_cpu(table)
    else:
        from pykvcache.kernels.launch import table as kernels_table

        kernels_table.use(table)


def section_name(device: torch.device | None) -> str:
    """Of a launch table: "cpu" or the GPU's architecture."""
    if device is None or device.type == "cpu":
        return "cpu"
    from pykvcache.kernels.launch.table import architecture

    return str(architecture(device))


def limits_of_calls(shape: Shape, section: str) -> dict[str, dict[str, int]]:
    """Which calls tuning measures, by phase: of this head dim, on a CPU of this element size.

    A GPU's decode tile serves every dtype, because the plan of a step is made before it is known.
    """
    if section == "cpu":
        where = {"dim": shape.head_dim, "bytes": shape.torch_dtype.itemsize}
        return dict.fromkeys(launch_table.PHASES, where)
    return {"decode": {"dim": shape.head_dim}}


def table_of(shape: Shape, launch: Launch, rows: int, section: str) -> dict[str, Any]:
    """A launch table with entries for the calls of this shape."""
    where = limits_of_calls(shape, section)
    entry = launch.entry()
    found: dict[str, Any] = {}
    if section != "cpu" and "splits" in entry:
        found["programs_per_sm"] = entry.pop("splits")
    if entry:
        found["decode"] = [where["decode"] | entry]
    if rows and "prefill" in where:
        found["prefill"] = [where["prefill"] | {"rows": rows}]
    return {section: found} if found else {}


def launches_for(device: torch.device, threads: int) -> list[Launch]:
    """The grid of launch parameters, the default first."""
    if device.type == "cpu":
        splits = (0, 1, 4) if threads > 1 else (0,)  # 0 is 2; one thread cuts nothing
        grid = [Launch(t, s, p) for t in (0, 16, 32, 64) for s in (0, 1, 2, 3) for p in splits]
        return [g for g in grid if bool(g.tile) == bool(g.stages)]
    return [
        DEFAULT,
        *(
            Launch(tile, stages, programs, warps)
            for tile in (16, 32, 64, 128)
            for stages in (2, 3, 4)
            for programs in (1, 2, 4)
            for warps in (4, 8)
        ),
    ]
