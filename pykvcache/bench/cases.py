"""The one registry of kernel cases: which shapes are measured.

Read next: pykvcache/bench/kernels.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Heads:
    """Attention shape of a model: query heads, KV heads, head dim."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Case:
    """One attention call: decode of one token a row, or causal prefill of whole prompts.

    `length` is the KV length of each of the `batch` rows. A "chunk" is a causal call of `queries`
    tokens a row, the last of `length`.
    """

    phase: str
    heads: Heads
    dtype: torch.dtype
    batch: int
    length: int
    queries: int = 0

    @property
    def name(self) -> str:
        return f"{self.phase} {self.heads.name} {self.dtype_name} B={self.batch} L={self.length}"

    @property
    def dtype_name(self) -> str:
        return NAMES[self.dtype]

    @property
    def query_len(self) -> int:
        return {"decode": 1, "prefill": self.length}.get(self.phase, self.queries)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once."""
        elements = 2 * self.batch * self.length * self.heads.num_kv_heads * self.heads.head_dim
        return elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Both matrix products; a causal prefill needs half of the square."""
        pairs = self.batch * self.length * self.query_len
        full = 4 * pairs * self.heads.num_heads * self.heads.head_dim
        if self.phase == "prefill":
            return full // 2
        unseen = self.batch * self.query_len * (self.query_len - 1) // 2
        return full - 4 * unseen * self.heads.num_heads * self.heads.head_dim


HEADS = {"gqa": Heads("gqa", 32, 8, 128), "mha": Heads("mha", 16, 16, 64)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
DECODE_SIZES = ((1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (32, 1024), (32, 4096))
QUICK_DECODE_SIZES = ((1, 1024), (1, 4096), (8, 4096))
PREFILL_SIZES = ((1, 2048), (1, 8192))
QUICK_PREFILL_SIZES = ((1, 2048),)


def select(
    phases: tuple[str, ...] = ("decode", "prefill"),
    heads: tuple[str, ...] = tuple(HEADS),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    quick: bool = False,
) -> list[Case]:
    """The cases of these phases, head shapes and dtypes; `quick` keeps a few sizes of each."""
    sizes = {
        "decode": QUICK_DECODE_SIZES if quick else DECODE_SIZES,
        "prefill": QUICK_PREFILL_SIZES if quick else PREFILL_SIZES,
    }
    return [
        Case(phase, HEADS[shape], DTYPES[dtype], batch, length)
        for phase, shape, dtype in itertools.product(phases, heads, dtypes)
        for batch, length in sizes[phase]
    ]
