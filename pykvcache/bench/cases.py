"""The one registry of kernel cases: which shapes are measured.

Read next: pykvcache/bench/tensors.py.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import torch

Groups = tuple[tuple[int, int], ...]
"""Rows of a batch, grouped: (rows, KV length of each)."""


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

    `length` is the KV length of each of the `batch` rows; where they differ it is the longest, and
    `mixed` has all of them. A "chunk" is a causal call of `queries` tokens a row, the last of
    `length`. `dtype` is that of K and V; q has it too, unless it is float8.
    """

    phase: str
    heads: Heads
    dtype: torch.dtype
    batch: int
    length: int
    queries: int = 0
    mixed: Groups = ()

    @classmethod
    def of(cls, phase: str, heads: Heads, dtype: torch.dtype, groups: Groups) -> Case:
        """The case of these rows.

        Raises:
            ValueError: their lengths differ, and it is no decode.
        """
        mixed = groups if len(groups) > 1 else ()
        if mixed and phase != "decode":
            raise ValueError(f"rows of different lengths are measured in decode, not in {phase}")
        batch = sum(rows for rows, _ in groups)
        return cls(phase, heads, dtype, batch, max(n for _, n in groups), mixed=mixed)

    @property
    def name(self) -> str:
        rows = f"B={self.batch} L={self.length_name}"
        return f"{self.phase} {self.heads.name} {self.dtype_name} {rows}"

    @property
    def dtype_name(self) -> str:
        return NAMES[self.dtype]

    @property
    def length_name(self) -> str:
        """4096, or 1x131072+31x4096."""
        return "+".join(f"{rows}x{n}" for rows, n in self.mixed) or str(self.length)

    @property
    def q_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == FLOAT8 else self.dtype

    @property
    def groups(self) -> Groups:
        return self.mixed or ((self.batch, self.length),)

    @property
    def lengths(self) -> list[int]:
        """KV length of each row."""
        return [length for rows, length in self.groups for _ in range(rows)]

    @property
    def query_len(self) -> int:
        return {"decode": 1, "prefill": self.length}.get(self.phase, self.queries)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once."""
        elements = 2 * sum(self.lengths) * self.heads.num_kv_heads * self.heads.head_dim
        return elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Both matrix products; a causal prefill needs half of the square."""
        pairs = sum(self.lengths) * self.query_len
        full = 4 * pairs * self.heads.num_heads * self.heads.head_dim
        if self.phase == "prefill":
            return full // 2
        unseen = self.batch * self.query_len * (self.query_len - 1) // 2
        return full - 4 * unseen * self.heads.num_heads * self.heads.head_dim


FLOAT8 = torch.float8_e4m3fn
HEADS = {
    "gqa": Heads("gqa", 32, 8, 128),
    "gqa8": Heads("gqa8", 32, 4, 128),
    "mha": Heads("mha", 16, 16, 64),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": FLOAT8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
USUAL_HEADS, USUAL_DTYPES = ("gqa", "mha"), ("bf16", "fp32")
DECODE_SIZES = ((1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (32, 1024), (32, 4096))
QUICK_DECODE_SIZES = ((1, 1024), (1, 4096), (8, 4096))
PREFILL_SIZES = ((1, 2048), (1, 8192))
QUICK_PREFILL_SIZES = ((1, 2048),)
ROWS = r"{0}(\+{0})*(,{0}(\+{0})*)*".format(r"[1-9]\d{0,7}x[1-9]\d{0,7}")


def select(
    phases: tuple[str, ...] = ("decode", "prefill"),
    heads: tuple[str, ...] = USUAL_HEADS,
    dtypes: tuple[str, ...] = USUAL_DTYPES,
    quick: bool = False,
    rows: tuple[Groups, ...] = (),
) -> list[Case]:
    """The cases of these phases, head shapes and dtypes; `quick` keeps a few sizes of each.

    Args:
        rows: these instead of the usual sizes, in every phase.

    Raises:
        ValueError: of `rows`, some differ in length, and there is another phase than decode.
    """
    usual = {
        "decode": QUICK_DECODE_SIZES if quick else DECODE_SIZES,
        "prefill": QUICK_PREFILL_SIZES if quick else PREFILL_SIZES,
    }
    return [
        Case.of(phase, HEADS[shape], DTYPES[dtype], groups)
        for phase, shape, dtype in itertools.product(phases, heads, dtypes)
        for groups in rows or ((size,) for size in usual[phase])
    ]


def read_rows(text: str) -> tuple[Groups, ...]:
    """ "32x4096,1x131072+31x4096" -> ((32, 4096),), ((1, 131072), (31, 4096)).

    Raises:
        ValueError: it is something else.
    """
    if not re.fullmatch(ROWS, text):
        raise ValueError(f"rows must look like 32x4096,1x131072+31x4096, got {text!r}")
    sizes = ([group.split("x") for group in rows.split("+")] for rows in text.split(","))
    return tuple(tuple((int(rows), int(length)) for rows, length in size) for size in sizes)
