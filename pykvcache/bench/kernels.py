"""Times `ops.paged_attention` beside torch SDPA on contiguous K and V, cold, checked first.

Every call of a contender touches another copy of its K and V until COLD_BYTES have gone by, as the
layers of a model do; a single copy would sit in the processor's caches and flatter. Blocks lie in
one pool as pykvcache/cache.py lays them out, in shuffled order. `folded` is SDPA with the query
heads of a KV head moved to the query axis: it reads each KV head once and is the honest baseline
for decode. Other peers are in peers.py. `loads` are plain vector loads of the same bytes without
any attention, of blocks in the order of memory and in the shuffled order: the second is what a
paged decode kernel could reach. On a GPU decode calls are replayed from CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pykvcache import ops
from pykvcache.bench import environment, peaks
from pykvcache.bench.cases import Case
from pykvcache.bench.timing import Contender, Missing, Timing, WrongResult, interleave
from pykvcache.storage import allocate

COLD_BYTES = 256 * 2**20
MOST_POOL_BYTES = 4 * COLD_BYTES
MOST_COPIES = 2**15
CHECKED_QUERIES = 32
SEED = 0


@dataclass(frozen=True)
class Result:
    """One contender on one case. Times in seconds; rates by the median; `peak` in the rate's unit.

    rate: bytes of KV a second in decode, FLOP a second in prefill.
    peak: read bandwidth or matrix-multiply rate of the same interleaved run.
    speedup: median of the baseline (`folded`, or `sdpa` where nothing is folded) over this median.
    """

    case: Case
    threads: int
    contender: str
    timing: Timing
    rate: float
    peak: float
    speedup: float
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "phase": case.phase,
            "heads": case.heads.name,
            "dtype": case.dtype_name,
            "batch": case.batch,
            "length": case.length,
            "threads": self.threads,
            "contender": self.contender,
            **asdict(self.timing),
            "device": self.device,
            "gb_per_second": case.kv_bytes / self.timing.median / 1e9,
            "gflop_per_second": case.flops / self.timing.median / 1e9,
            "intensity": case.flops / case.kv_bytes,
            "rate": self.rate,
            "peak": self.peak,
            "speedup": self.speedup,
        }


def pool_bytes(case: Case, block_size: int) -> int:
    """Bytes of the whole blocks that hold K and V once."""
    per_row = -(-case.length // block_size) * block_size
    return case.kv_bytes // case.length * per_row


def count_copies(case: Case, block_sizes: Sequence[int]) -> int:
    """Copies of K and V that make calls cold, as far as their pools may grow."""
    largest = max((pool_bytes(case, size) for size in block_sizes), default=case.kv_bytes)
    wanted = -(-COLD_BYTES // case.kv_bytes)
    return max(1, min(wanted, MOST_COPIES, MOST_POOL_BYTES // largest))


def check_memory(case: Case, block_sizes: Sequence[int], device: str = "cpu") -> None:
    """Raise ValueError unless K and V, dense and in blocks, fit the memory that is free."""
    copies = count_copies(case, block_sizes)
    queries = 4 * case.batch * case.query_len * case.heads.num_heads * case.heads.head_dim
    needed = copies * (case.kv_bytes + sum(pool_bytes(case, size) for size in block_sizes))
    needed += 16 * queries + 4 * case.kv_bytes  # outputs, and the reference's own in float32
    free = environment.free_memory(device)
    if free is not None and needed > free:
        sizes = ", ".join(map(str, block_sizes))
        raise ValueError(
            f"{case.name} in blocks of {sizes} needs {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free"
        )


class Workload:
    """Tensors of a case and the contenders over them; all copies hold the same K and V.

    Args:
        case: what is called.
        block_sizes: one paged contender each.
        backends: of the paged contenders; the first is not named in them.
        device: where everything is.
        peers: names in peers.PEERS; what cannot run is in `missing`, with the reason.
        wgmma: prefill once more with the wgmma kernel of backend "cuda".
    """

    def __init__(
        self,
        case: Case,
        block_sizes: Sequence[int],
        backends: Sequence[str] = ("cpu",),
        device: str = "cpu",
        peers: Sequence[str] = (),
        wgmma: bool = False,
    ) -> None:
        torch.manual_seed(SEED)
        self.device = torch.device(device)
        heads = case.heads
        self.case = case
        self.copies = count_copies(case, block_sizes)
        query = (case.batch, heads.num_heads, case.query_len, heads.head_dim)
        kv = (case.batch, heads.num_kv_heads, case.length, heads.head_dim)
        self.q = self._random(query)
        self.k = self._random(kv).expand(self.copies, *kv).contiguous()
        self.v = self._random(kv).expand(self.copies, *kv).contiguous()
        self.packed_q = self.q.transpose(1, 2).flatten(0, 1).contiguous()  # [T, HQ, D]
        self.seq_lens = torch.full((case.batch,), case.length, dtype=torch.int32).to(self.device)
        steps = torch.arange(case.batch + 1, dtype=torch.int32)
        self.cu_seqlens_q = (steps * case.query_len).to(self.device)
        self.mask = None
        if case.phase == "chunk":
            seen = torch.arange(case.length)[None] - torch.arange(case.query_len)[:, None]
            self.mask = (seen <= case.length - case.query_len).to(self.device)
        self.contenders: dict[str, Contender] = {"sdpa": self.sdpa}
        self.readers: dict[str, Contender] = {}  # compute nothing, so nothing to check
        if case.phase == "decode" and heads.group > 1:
            self.contenders["folded"] = self.folded
        self.missing: dict[str, str] = {}
        self._add_peers(peers)
        for block_size in block_sizes:
            for i, backend in enumerate(backends):
                name = f"paged {block_size}" + (f" {backend}" if i else "")
                self.contenders[name] = self.paged(block_size, backend)
                if wgmma and backend == "cuda" and case.phase != "decode":
                    self.add_wgmma(name)
        if self.device.type == "cuda" and case.phase == "decode":
            self.replay_graphs()

    def add_wgmma(self, name: str) -> None:
        """The contender `name` of backend "cuda" once more, with the wgmma kernel."""
        from pykvcache.bench.gpu import with_wgmma

        self.contenders[f"{name} wgmma"] = with_wgmma(self.contenders[name])

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape).to(self.case.dtype).to(self.device)

    def _add_peers(self, names: Sequence[str]) -> None:
        """Those of peers.PEERS that run here; a peer that fails is no reason to stop."""
        from pykvcache.bench.peers import PEERS

        for name in names:
            try:
                self.contenders |= PEERS[name](self)
            except Missing as reason:
                self.missing[name] = str(reason)

    @property
    def baseline(self) -> str:
        return "folded" if "folded" in self.contenders else "sdpa"

    def sdpa(self, call: int) -> Tensor:
        copy = call % self.copies
        return scaled_dot_product_attention(
            self.q,
            self.k[copy],
            self.v[copy],
            attn_mask=self.mask,
            is_causal=self.case.phase == "prefill",
            enable_gqa=self.case.heads.group > 1,
        )

    def folded(self, call: int) -> Tensor:
        copy = (call + self.copies // 2) % self.copies  # not the one that `sdpa` has just read
        heads = self.case.heads
        q = self.q.view(self.case.batch, heads.num_kv_heads, heads.group, heads.head_dim)
        return scaled_dot_product_attention(q, self.k[copy], self.v[copy]).view_as(self.q)

    def paged(self, block_size: int, backend: str = "cpu") -> Contender:
        """`ops.paged_attention` over shuffled blocks; its output is [T, HQ, D]."""
        case, heads = self.case, self.case.heads
        per_row = -(-case.length // block_size)
        tables = torch.randperm(self.copies * case.batch * per_row, dtype=torch.int32)
        tables = tables.view(self.copies, case.batch, per_row)
        half = heads.num_kv_heads * block_size * heads.head_dim
        storage = allocate(tables.numel(), 2 * half, case.dtype, self.device).zero_()
        shape = (tables.numel(), heads.num_kv_heads, block_size, heads.head_dim)
        k_cache, v_cache = (part.view(shape) for part in storage.split(half, dim=1))
        if case.phase == "decode" and backend == "cpu":
            in_order = torch.arange(tables.numel(), dtype=torch.int32).view_as(tables)
            if not self.readers:
                self.readers["loads in order"] = peaks.block_reader(storage, in_order)
            self.readers[f"loads {block_size}"] = peaks.block_reader(storage, tables)
        for copy in range(self.copies):
            _fill(k_cache, tables[copy], self.k[copy])
            _fill(v_cache, tables[copy], self.v[copy])
        tables = tables.to(self.device)

        def run(call: int) -> Tensor:
            out, _ = ops.paged_attention(
                self.packed_q,
                k_cache,
                v_cache,
                tables[call % self.copies],
                self.seq_lens,
                self.cu_seqlens_q,
                case.query_len,
                backend=backend,
            )
            return out

        return run

    def replay_graphs(self) -> None:
        """Replace the contenders by graphs of them, except those that cannot be captured."""
        from pykvcache.bench.gpu import as_graphs

        for name, run in self.contenders.items():
            try:
                self.contenders[name] = as_graphs(run, self.copies)
            except RuntimeError as error:
                self.missing[f"graph of {name}"] = str(error).partition("\n")[0]

    def check(self) -> None:
        """Raise WrongResult unless every contender meets the reference.

        A paged result may be off by twice what SDPA in the same dtype is, plus one rounding step.
        """
        queries, expected = self._expected
        errors = {}
        for name, run in self.contenders.items():
            out = run(self.copies - 1)
            if out.dim() == 4:  # [B, HQ, q, D]
                out = out.transpose(1, 2).flatten(0, 1)
            errors[name] = (out[queries].float().cpu() - expected).abs().max().item()
        rounding = torch.finfo(self.case.dtype).eps * expected.abs().max().item()
        allowed = 2 * errors["sdpa"] + rounding
        for name, error in errors.items():
            if not error <= allowed:  # also when the error is NaN
                raise WrongResult(
                    f"{self.case.name}: {name} is off by {error:.3g}, allowed {allowed:.3g}"
                )

    @cached_property
    def _expected(self) -> tuple[Tensor, Tensor]:
        """Packed query numbers, and their output by the reference in float32 [n, HQ, D].

        The reference sees K and V as one block a row. A prefill is checked at its first, middle and
        last queries, which are prefills of their own that end there.
        """
        case = self.case
        caches = self.k[0].float().cpu(), self.v[0].float().cpu()
        table = torch.arange(case.batch, dtype=torch.int32)[:, None]
        count = min(CHECKED_QUERIES, case.query_len)
        ends = sorted({count, max(count, case.query_len // 2), case.query_len})
        chosen, outputs = [], []
        for end in ends:
            rows = torch.arange(case.batch)[:, None] * case.query_len
            queries = (rows + torch.arange(end - count, end)).flatten()
            out, _ = ops.paged_attention(
                self.packed_q[queries].float().cpu(),
                *caches,
                table,
                self.seq_lens.cpu() - (case.query_len - end),
                torch.arange(case.batch + 1, dtype=torch.int32) * count,
                count,
                backend="reference",
            )
            chosen.append(queries)
            outputs.append(out)
        return torch.cat(chosen), torch.cat(outputs)


def _fill(cache: Tensor, table: Tensor, rows: Tensor) -> None:
    """Write rows [B, HKV, L, D] into the blocks that table [B, blocks] names."""
    block_size = cache.shape[2]
    for blocks, row in zip(table.long(), rows, strict=True):
        for i, block in enumerate(blocks.tolist()):
            part = row[:, i * block_size : (i + 1) * block_size]
            cache[block, :, : part.shape[1]] = part


def measure(
    case: Case,
    block_sizes: Sequence[int],
    thread_counts: Sequence[int],
    seconds: float,
    backends: Sequence[str] = ("cpu",),
    device: str = "cpu",
    peers: Sequence[str] = (),
    missing: dict[str, str] | None = None,
    wgmma: bool = False,
) -> Iterator[Result]:
    """Per thread count: check a case, then time contenders and peak in one interleaved run.

    Leaves torch with the last thread count. `missing` gets the peers that could not run.

    Raises:
        WrongResult: before anything is timed.
    """
    workload = Workload(case, block_sizes, backends, device, peers, wgmma)
    if missing is not None:
        for name, reason in workload.missing.items():
            if reason not in missing.setdefault(name, reason):
                missing[name] += f"; {reason}"
    for threads in thread_counts if device == "cpu" else (0,):
        if threads:
            torch.set_num_threads(threads)
        workload.check()
        yield from _timed(workload, threads, seconds)


def _timed(workload: Workload, threads: int, seconds: float) -> Iterator[Result]:
    case = workload.case
    decode = case.phase == "decode"
    shown = workload.contenders | workload.readers
    on_gpu = workload.device.type == "cuda"
    if on_gpu:
        from pykvcache.bench import gpu

        peak_contenders = gpu.peak_contenders(case, workload.device)
        timings = interleave(shown | peak_contenders, seconds, gpu.elapsed)
    else:
        peak_contenders = peaks.read_contenders() if decode else peaks.gemm_contenders(case.dtype)
        timings = interleave(shown | peak_contenders, seconds)
    if decode:
        peak = gpu.copy_rate(timings, case) if on_gpu else peaks.read_bandwidth(timings)
    else:
        peak = gpu.gemm_rate(timings) if on_gpu else peaks.gemm_rate(timings)
    work = case.kv_bytes if decode else case.flops
    baseline = timings[workload.baseline].median
    for name in shown:
        timing = timings[name]
        rate, speedup = work / timing.median, baseline / timing.median
        yield Result(case, threads, name, timing, rate, peak, speedup, workload.device.type)
