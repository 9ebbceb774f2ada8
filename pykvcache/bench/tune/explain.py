"""What one call of paged attention does: kernel, launch, work, floor, and what it achieves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pykvcache import launch_table, ops
from pykvcache.bench import environment, peaks
from pykvcache.bench.cases import Case, Heads
from pykvcache.bench.kernels import Workload
from pykvcache.bench.tensors import check_memory
from pykvcache.bench.timing import Timing, interleave
from pykvcache.bench.tune.shapes import DTYPES

FIELDS = {"B": 1, "L": None, "HQ": None, "HKV": None, "D": None, "block_size": 16, "q": 1}
EXPLAIN_STEPS = 3
DTYPE_NUMBERS = {"fp32": 0, "fp16": 1, "bf16": 2}


@dataclass(frozen=True)
class CallSpec:
    """One call: B rows of q new tokens after L - q cached ones."""

    batch: int
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    query_len: int
    dtype: str

    @classmethod
    def parse(cls, text: str) -> CallSpec:
        """From "B=8,L=4096,HQ=32,HKV=8,D=128,block_size=16,dtype=bf16,q=1".

        Raises:
            ValueError: a field is unknown, missing or wrong.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name in found:
                raise ValueError(f"explain: {name} is given twice")
            if name == "dtype":
                found[name] = value
            elif name not in FIELDS:
                raise ValueError(f"explain knows {', '.join(FIELDS)}, dtype; got {part.strip()!r}")
            elif not value.isdecimal() or int(value) < 1:
                raise ValueError(f"explain: {name} must be a positive integer, got {value!r}")
            else:
                found[name] = int(value)
        needed = [name for name, default in FIELDS.items() if default is None]
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(f"explain needs {', '.join(missing)}")
        numbers = [int(found.get(name) or default or 0) for name, default in FIELDS.items()]
        batch, length, heads, kv_heads, dim, block_size, query_len = numbers
        dtype = found.get("dtype", "bf16")
        if dtype not in DTYPES:
            raise ValueError(f"explain: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if heads % kv_heads:
            raise ValueError(f"explain: HQ must be a multiple of HKV, got {heads} and {kv_heads}")
        if dim > launch_table.MOST_DIM:
            raise ValueError(f"explain: D must be {launch_table.MOST_DIM} at most, got {dim}")
        if query_len > length:
            raise ValueError(f"explain: q must be L at most, got {query_len} and {length}")
        return cls(batch, length, heads, kv_heads, dim, block_size, query_len, dtype)

    @property
    def bytes(self) -> int:
        """K and V once, queries and output once, the block table once."""
        size = DTYPES[self.dtype].itemsize
        kv = 2 * self.batch * self.length * self.num_kv_heads * self.head_dim * size
        queries = 2 * self.batch * self.query_len * self.num_heads * self.head_dim * size
        return kv + queries + 4 * self.batch * -(-self.length // self.block_size)

    @property
    def flops(self) -> int:
        """Both products, of the pairs that a causal mask leaves."""
        q = self.query_len
        pairs = q * (self.length - q) + q * (q + 1) // 2
        return 4 * self.batch * pairs * self.num_heads * self.head_dim


@dataclass(frozen=True)
class Explanation:
    """Rates in bytes and FLOP a second, times in seconds."""

    spec: CallSpec
    backend: str
    kernel: str
    launch: dict[str, int]
    bandwidth: float
    flop_rate: float
    timing: Timing

    @property
    def floor(self) -> float:
        """The least time: bytes over read bandwidth or FLOPs over the rate of a matrix multiply."""
        return max(self.spec.bytes / self.bandwidth, self.spec.flops / self.flop_rate)

    @property
    def bound(self) -> str:
        reading = self.spec.bytes / self.bandwidth
        return "reading" if reading >= self.spec.flops / self.flop_rate else "arithmetic"

    def lines(self) -> list[tuple[str, str]]:
        spec, median = self.spec, self.timing.median
        launch = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.launch.items())
        return [
            ("backend", self.backend),
            ("kernel", self.kernel),
            ("launch", launch),
            ("must move", f"{spec.bytes / 2**20:,.2f} MiB ({spec.bytes:,} bytes)"),
            ("must compute", f"{spec.flops / 1e9:,.3f} GFLOP ({spec.flops:,})"),
            ("intensity", f"{spec.flops / spec.bytes:.2f} FLOP a byte"),
            (
                "peaks now",
                f"{self.bandwidth / 1e9:.1f} GB/s read, {self.flop_rate / 1e9:,.0f} GFLOP/s",
            ),
            ("floor", f"{1e6 * self.floor:,.1f} us, by {self.bound}"),
            (
                "achieved",
                f"{1e6 * median:,.1f} us (p10 {1e6 * self.timing.p10:,.1f}, p90 "
                f"{1e6 * self.timing.p90:,.1f}), {spec.bytes / median / 1e9:.1f} GB/s, "
                f"{spec.flops / median / 1e9:,.1f} GFLOP/s: {100 * self.floor / median:.0f} % of "
                "the floor's speed",
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self.spec),
            "backend": self.backend,
            "kernel": self.kernel,
            "launch": self.launch,
            "bytes": self.spec.bytes,
            "flops": self.spec.flops,
            "bandwidth": self.bandwidth,
            "flop_rate": self.flop_rate,
            "floor": self.floor,
            "bound": self.bound,
            **vars(self.timing),
        }


def cpu_report(spec: CallSpec) -> dict[str, int]:
    """What the launcher of the CPU kernels would do with a call; see csrc/cpu/launches.h."""
    from pykvcache import _C

    return _C.explain_launch(
        DTYPE_NUMBERS[spec.dtype],
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.block_size,
        [spec.length] * spec.batch,
        [spec.query_len] * spec.batch,
    )


def describe_launch(spec: CallSpec) -> tuple[str, dict[str, int]]:
    """Kernel and launch of a call on the CPU, as the launcher itself finds them."""
    report = cpu_report(spec)
    isa = environment.cpu_isa()
    kept: tuple[str, ...]
    if report["decode_items"]:
        streamed = report["stages"] == 0  # two streams instead of steps prefetched ahead
        kept = ("tile", "stages", "items", "most_splits", "cut_rows", "threads")
        source = "decode_streams.h" if streamed else "decode.cpp"
        return f"decode (csrc/cpu/kernels/{source}), {isa}", {key: report[key] for key in kept}
    kept = ("query_tile", "items", "most_splits", "cut_rows", "threads")
    return f"general (csrc/cpu/kernels/prefill.cpp), {isa}", {key: report[key] for key in kept}


def explain(
    spec: CallSpec,
    seconds: float = 2.0,
    device: str = "cpu",
    backend: str = "auto",
    advance: Callable[..., object] = lambda steps=1, title=None: None,
) -> Explanation:
    """Check the call against the reference, then time it cold beside the peaks.

    advance(title=...) is called before each of EXPLAIN_STEPS.

    Raises:
        WrongResult: the kernel is wrong. RuntimeError: no kernels for this device.
        ValueError: K and V do not fit the memory that is free.
    """
    heads = Heads("call", spec.num_heads, spec.num_kv_heads, spec.head_dim)
    phase = "decode" if spec.query_len == 1 else "chunk"
    case = Case(phase, heads, DTYPES[spec.dtype], spec.batch, spec.length, spec.query_len)
    check_memory(case, [spec.block_size], device)
    if device != "cpu":
        from pykvcache.bench.gpu import explain_on_gpu

        return explain_on_gpu(spec, case, seconds, backend, advance)
    if ops.backends()["cpu"] != "ready":
        raise RuntimeError(f"backend 'cpu' is not available: {ops.backends()['cpu']}")
    advance(title="filling the pool")
    workload = Workload(case, [spec.block_size])
    advance(title="checking")
    workload.check()
    advance(title="timing")
    name = f"paged {spec.block_size}"
    read, gemm = peaks.read_contenders(), peaks.gemm_contenders(case.dtype)
    timings = interleave({name: workload.contenders[name]} | read | gemm, seconds)
    kernel, launch = describe_launch(spec)
    return Explanation(
        spec, "cpu", kernel, launch, peaks.read_bandwidth(timings), peaks.gemm_rate(timings),
        timings[name],
    )  # fmt: skip
