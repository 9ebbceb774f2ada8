"""Times `ops.paged_attention` beside torch SDPA on contiguous K and V, cold, checked first.

Every call of a contender touches another copy of its K and V until COLD_BYTES have gone by, as the
layers of a model do; a single copy would sit in the processor's caches and flatter. Blocks lie in
one pool as pykvcache/cache.py lays them out, in shuffled order. `folded` is SDPA with the query
heads of a KV head moved to the query axis: it reads each KV head once and is the honest baseline
for decode. Other peers are in peers.py. `loads` are plain vector loads of the same bytes without
any attention, of blocks in the order of memory and in the shuffled order: the second is what a
paged decode kernel could reach. A plan is made once, as a step makes it for all of its layers; on
GPU backends `plan` is the time that takes. On a GPU decode calls are replayed from CUDA graphs.

Rows of different lengths have two contenders more, the same kernel with the same CTAs: `equal
splits` gives each row as many of them, as a grid of splits x rows does, and `fixed splits` deals
out pieces of one length (deterministic=True). Dense attention is then one call for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pykvcache import ops
from pykvcache.bench import peaks
from pykvcache.bench.cases import Case
from pykvcache.bench.tensors import Tensors
from pykvcache.bench.timing import Contender, Missing, Timing, WrongResult, interleave
from pykvcache.storage import allocate

PLAN = "plan"


@dataclass(frozen=True)
class Result:
    """One contender on one case. Times in seconds; rates by the median; `peak` in the rate's unit.

    rate: bytes of KV a second in decode, FLOP a second in prefill; 0 for a plan.
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
        case, median = self.case, self.timing.median
        attends = not self.contender.startswith(PLAN)
        return {
            "phase": case.phase,
            "heads": case.heads.name,
            "dtype": case.dtype_name,
            "batch": case.batch,
            "length": case.length,
            **({"mixed": case.length_name} if case.mixed else {}),
            "threads": self.threads,
            "contender": self.contender,
            **asdict(self.timing),
            "device": self.device,
            "gb_per_second": attends * case.kv_bytes / median / 1e9,
            "gflop_per_second": attends * case.flops / median / 1e9,
            "intensity": case.flops / case.kv_bytes,
            "rate": self.rate,
            "peak": self.peak,
            "speedup": self.speedup,
        }


class Workload(Tensors):
    """Tensors of a case and the contenders over them.

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
        super().__init__(case, block_sizes, device)
        self.contenders: dict[str, Contender] = {"sdpa": self.sdpa}
        self.others: dict[str, Contender] = {}  # no attention, so nothing to check
        if case.phase == "decode" and case.heads.group > 1:
            self.contenders["folded"] = self.folded
        self.missing: dict[str, str] = {}
        self._add_peers(peers)
        pools = {block_size: self.pool(block_size) for block_size in block_sizes}
        for i, backend in enumerate(backends):
            self._add_paged(pools, backend, f" {backend}" if i else "", wgmma)
        if self.device.type == "cuda" and case.phase == "decode":
            self.contenders = self._graphs_of(self.contenders)
            self.others = self._graphs_of(self.others)

    def _add_paged(
        self, pools: Mapping[int, Callable[..., Tensor]], backend: str, suffix: str, wgmma: bool
    ) -> None:
        partitions = self._partitions(backend)
        decode = self.case.phase == "decode"
        for block_size, attend in pools.items():
            name = f"paged {block_size}{suffix}"
            for partition, options in partitions.items():
                self.contenders[name + partition] = partial(attend, backend=backend, **options)
            if wgmma and backend == "cuda" and not decode:
                self.add_wgmma(name)
        if decode and partitions[""]["plan"].numel():
            self.others[PLAN + suffix] = lambda _: self._plan(backend)

    def add_wgmma(self, name: str) -> None:
        """The contender `name` of backend "cuda" once more, with the wgmma kernel."""
        from pykvcache.bench.gpu import with_wgmma

        self.contenders[f"{name} wgmma"] = with_wgmma(self.contenders[name])

    def _add_peers(self, names: Sequence[str]) -> None:
        """Those of peers.PEERS that run here; a peer that fails is no reason to stop."""
        from pykvcache.bench.peers import find_peer

        for name in names:
            try:
                self.contenders |= find_peer(name, self)
            except Missing as reason:
                self.missing[name] = str(reason)

    @property
    def baseline(self) -> str:
        return "folded" if "folded" in self.contenders else "sdpa"

    def sdpa(self, call: int) -> Tensor:
        copy = call % self.copies
        found = [
            scaled_dot_product_attention(
                q,
                k[copy],
                v[copy],
                attn_mask=self.mask,
                is_causal=self.case.phase == "prefill",
                enable_gqa=self.case.heads.group > 1,
            )
            for q, (k, v) in zip(self.queries, self.dense, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def folded(self, call: int) -> Tensor:
        copy = (call + self.copies // 2) % self.copies  # not the one that `sdpa` has just read
        heads = self.case.heads
        shape = (-1, heads.num_kv_heads, heads.group, heads.head_dim)
        found = [
            scaled_dot_product_attention(q.view(shape), k[copy], v[copy]).view_as(q)
            for q, (k, v) in zip(self.queries, self.dense, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def pool(self, block_size: int) -> Callable[..., Tensor]:
        """attend(call, backend=..., plan=...) over shuffled blocks; its output is [T, HQ, D]."""
        case, heads = self.case, self.case.heads
        order, counts = self.shuffled_blocks(block_size)
        half = heads.num_kv_heads * block_size * heads.head_dim
        storage = allocate(order.numel(), 2 * half, case.dtype, self.device).zero_()
        shape = (order.numel(), heads.num_kv_heads, block_size, heads.head_dim)
        k_cache, v_cache = (part.view(shape) for part in storage.split(half, dim=1))
        if case.phase == "decode" and self.device.type == "cpu":
            in_order = torch.arange(order.numel(), dtype=torch.int32).view_as(order)
            if not self.others:
                self.others["loads in order"] = peaks.block_reader(storage, in_order)
            self.others[f"loads {block_size}"] = peaks.block_reader(storage, order)
        self.fill(k_cache, v_cache, order)
        tables = torch.full((self.copies, case.batch, max(counts)), -1, dtype=torch.int32)
        for row, ids in enumerate(order.split(counts, dim=1)):
            tables[:, row, : counts[row]] = ids
        tables = tables.to(self.device)

        def attend(call: int, **options: Any) -> Tensor:
            out, _ = ops.paged_attention(
                self.packed_q,
                k_cache,
                v_cache,
                tables[call % self.copies],
                self.seq_lens,
                self.cu_seqlens_q,
                case.query_len,
                k_scale=self.kv_scale,
                v_scale=self.kv_scale,
                **options,
            )
            return out

        return attend

    def _plan(self, backend: str, deterministic: bool = False) -> Tensor:
        heads = self.case.heads
        return ops.plan(
            self.seq_lens,
            self.cu_seqlens_q,
            self.case.query_len,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            deterministic=deterministic,
            backend=backend,
        )

    def _partitions(self, backend: str) -> dict[str, dict[str, Any]]:
        """Ways to share out the work: options of `ops.paged_attention`, by end of the name."""
        plan = self._plan(backend)
        found: dict[str, dict[str, Any]] = {"": {"plan": plan}}
        if self.case.mixed and plan.numel():
            fixed = self._plan(backend, deterministic=True)
            found[" equal splits"] = {"plan": equal_shares(plan)}
            found[" fixed splits"] = {"plan": fixed, "deterministic": True}
        return found

    def _graphs_of(self, contenders: Mapping[str, Contender]) -> dict[str, Contender]:
        """Graphs of contenders; those that cannot be captured stay as they are."""
        from pykvcache.bench.gpu import as_graphs

        found = dict(contenders)
        for name, run in contenders.items():
            try:
                found[name] = as_graphs(run, self.copies)
            except RuntimeError as error:
                self.missing[f"graph of {name}"] = str(error).partition("\n")[0]
        return found

    def check(self) -> None:
        """Raise WrongResult unless every contender meets the reference.

        A paged result may be off by twice what SDPA in the same dtype is, plus one rounding step.
        """
        queries, expected = self.expected
        errors = {}
        for name, run in self.contenders.items():
            out = run(self.copies - 1)
            if out.dim() == 4:  # [B, HQ, q, D]
                out = out.transpose(1, 2).flatten(0, 1)
            errors[name] = (out[queries].float().cpu() - expected).abs().max().item()
        rounding = torch.finfo(self.case.q_dtype).eps * expected.abs().max().item()
        allowed = 2 * errors["sdpa"] + rounding
        for name, error in errors.items():
            if not error <= allowed:  # also when the error is NaN
                raise WrongResult(
                    f"{self.case.name}: {name} is off by {error:.3g}, allowed {allowed:.3g}"
                )


def equal_shares(plan: Tensor) -> Tensor:
    """A plan of GPU backends in which all rows have as much work as the longest.

    Programs share the work of a plan evenly, so each row gets as many of them. What a short row has
    too much lies after its end, where a program finds no key.
    """
    rows = torch.arange(len(plan), dtype=plan.dtype, device=plan.device)
    return rows * plan.diff().max()


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
    shown = workload.contenders | workload.others
    on_gpu = workload.device.type == "cuda"
    if on_gpu:
        from pykvcache.bench import gpu

        peak_contenders = gpu.peak_contenders(case, workload.device)
        timings = interleave(shown | peak_contenders, seconds, gpu.elapsed)
    else:
        peak_contenders = peaks.read_contenders() if decode else peaks.gemm_contenders(case.q_dtype)
        timings = interleave(shown | peak_contenders, seconds)
    if decode:
        peak = gpu.copy_rate(timings, case) if on_gpu else peaks.read_bandwidth(timings)
    else:
        peak = gpu.gemm_rate(timings) if on_gpu else peaks.gemm_rate(timings)
    work = case.kv_bytes if decode else case.flops
    baseline = timings[workload.baseline].median
    for name in shown:
        timing = timings[name]
        rate = 0.0 if name.startswith(PLAN) else work / timing.median
        speedup = baseline / timing.median
        yield Result(case, threads, name, timing, rate, peak, speedup, workload.device.type)
