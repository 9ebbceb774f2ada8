"""The case table of `paged_attention`: one list that every backend runs.

A case says shapes, lengths and features; `build` makes its tensors, hostile on purpose: the block
table is shuffled, every slot that holds no token is NaN, and table entries past a row's length are
garbage.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

GARBAGE_BLOCK = 2147480000  # past seq_len: must never be read


@dataclass(frozen=True)
class Case:
    """One call: `rows` are (query tokens, KV length) pairs, `holes` (row, block index) pairs."""

    name: str
    rows: tuple[tuple[int, int], ...] = ((1, 37),)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    causal: bool = True
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    bias: str = ""  # "bool", "float", or either with "-broadcast" for one head and one row
    scales: str = ""  # "scalar", "head", "slot" or "channel"
    holes: tuple[tuple[int, int], ...] = ()
    layout: str = "HND"
    latent: bool = False  # v_cache=None: V is the first v_head_dim of K
    shared_prefix: int = 0  # blocks that all rows share
    strided_q: bool = False
    factor: float = 1.25  # of the usual scale
    spread: float = 1.0  # standard deviation of q and k: larger means a sharper softmax

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(eq=False)
class Data:
    """Tensors of a case: `args` and `kwargs` of ops.paged_attention, and each row's K and V."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: list[Tensor] = field(default_factory=list)  # [length, HKV, D], what the cache holds
    values: list[Tensor] = field(default_factory=list)
    present: list[Tensor] = field(default_factory=list)  # bool [length], False in holes


@functools.lru_cache(maxsize=2)
def build(case: Case, seed: int = 0) -> Data:
    """Make the tensors of a case on the CPU; treat them as read-only, they are cached."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    v_dim = case.v_head_dim or case.head_dim
    lengths = [kv for _, kv in case.rows]
    q_lens = [q for q, _ in case.rows]
    blocks_of = [-(-length // case.block_size) for length in lengths]
    num_blocks = sum(blocks_of) + 3
    max_blocks = max(blocks_of, default=0) + 2
    ids = torch.randperm(num_blocks, generator=rng).tolist()
    table = torch.full((len(lengths), max_blocks), GARBAGE_BLOCK, dtype=torch.int32)
    prefix = [ids.pop() for _ in range(min([case.shared_prefix, *blocks_of]))]
    for row, count in enumerate(blocks_of):
        own = prefix + [ids.pop() for _ in range(count - len(prefix))]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)

    storage = case.cache_dtype or case.dtype
    pool_shape = (num_blocks, case.num_kv_heads, case.block_size)
    k_pool = torch.full((*pool_shape, case.head_dim), torch.nan)
    v_pool = torch.full((*pool_shape, v_dim), torch.nan)
    for row, length in enumerate(lengths):
        for position in range(length):
            block, slot = divmod(position, case.block_size)
            at = (int(table[row, block]), slice(None), slot)
            k_pool[at] = randn(case.num_kv_heads, case.head_dim) * case.spread
            v_pool[at] = randn(case.num_kv_heads, v_dim)
    written = ~k_pool[..., 0].isnan()
    k_scale, v_scale = (_scale(case, written, dim, rng) for dim in (case.head_dim, v_dim))
    k_pool, v_pool = k_pool.to(storage), v_pool.to(storage)
    for row, index in case.holes:
        table[row, index] = -1

    data = Data((), {})
    for row, length in enumerate(lengths):
        position = torch.arange(length)
        block = table[row][position // case.block_size].long()
        data.present.append(block >= 0)
        at = (block.clamp(min=0), slice(None), position % case.block_size)
        keys = _dequantise(k_pool, k_scale, at, case.block_size)
        values = _dequantise(v_pool, v_scale, at, case.block_size)
        if case.latent:
            values = keys[..., :v_dim]
        data.keys.append(torch.where(data.present[-1][:, None, None], keys, 0.0))
        data.values.append(torch.where(data.present[-1][:, None, None], values, 0.0))

    total = sum(q_lens)
    slices = 3 if case.strided_q else 1  # 3: as a slice of one packed q, k, v projection
    q = (randn(total, slices, case.num_heads, case.head_dim) * case.spread).to(case.dtype)[:, 0]
    if case.layout == "NHD":
        k_pool, v_pool = (x.transpose(1, 2).contiguous() for x in (k_pool, v_pool))
    starts = torch.tensor([0, *q_lens]).cumsum(0).int()
    data.args = (
        q,
        k_pool,
        None if case.latent else v_pool,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        starts,
        max(q_lens, default=0),
    )
    data.kwargs = {
        "scale": case.head_dim**-0.5 * case.factor,
        "causal": case.causal,
        "window": case.window,
        "chunk": case.chunk,
        "softcap": case.softcap,
        "sinks": randn(case.num_heads) if case.sinks else None,
        "alibi_slopes": torch.rand(case.num_heads, generator=rng) * 0.3 if case.alibi else None,
        "bias": _bias(case, rng),
        "k_scale": k_scale,
        "v_scale": None if case.latent else v_scale,
        "v_head_dim": v_dim if case.latent else None,
        "layout": case.layout,
    }
    return data


def _scale(case: Case, written: Tensor, dim: int, rng: torch.Generator) -> Tensor | None:
    """Those of a block lie apart from the next block's, and are NaN where nothing was written.

    Args:
        written: bool [num_blocks, HKV, block_size].
    """
    if case.scales in ("", "scalar", "head"):
        shape = (case.num_kv_heads,) if case.scales == "head" else ()
        return torch.rand(shape, generator=rng) + 0.5 if case.scales else None
    if case.scales == "channel":
        written = written.any(-1, keepdim=True).expand(-1, -1, dim)
    values = torch.rand(written.shape, generator=rng) + 0.5
    room = torch.full((len(written), values[0].numel() + 9), torch.nan)
    scale = room[:, 4:-5].view(values.shape)
    scale[written] = values[written]
    return scale


def _dequantise(pool: Tensor, scale: Tensor | None, at: tuple[Any, ...], block_size: int) -> Tensor:
    stored = pool.float()[at]
    if scale is None or scale.dim() == 0:
        return stored * (1.0 if scale is None else scale)
    if scale.dim() == 1:
        return stored * scale[:, None]
    if scale.shape[-1] == block_size:
        return stored * scale[at][..., None]
    return stored * scale[at[0]]


def _bias(case: Case, rng: torch.Generator) -> Tensor | None:
    if not case.bias:
        return None
    batch, heads = len(case.rows), case.num_heads
    if case.bias.endswith("-broadcast"):
        batch, heads = 1, 1
    shape = (batch, heads, max(q for q, _ in case.rows), max(kv for _, kv in case.rows) + 5)
    if case.bias.startswith("bool"):
        return torch.rand(shape, generator=rng) > 0.4
    return torch.randn(shape, generator=rng)


MIXED = ((1, 37), (5, 5), (17, 64), (1, 0), (3, 100), (0, 20), (1, 1))
DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 0), (1, 130))
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _across(case: Case, *dtypes: torch.dtype) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in dtypes]


def _groups() -> list[Case]:
    """Query heads per KV head, in decode and in prefill."""
    cases = []
    for group in (1, 3, 4, 6, 7, 8, 12, 16, 64):
        heads = {"num_heads": group * 2, "num_kv_heads": 2, "rows": ((1, 70), (6, 33), (1, 3))}
        cases += _across(Case(f"group-{group}", **heads), F32, BF16)
    return cases


def _head_dims() -> list[Case]:
    cases = []
    for dim in (1, 7, 16, 32, 80, 96, 112, 120, 128, 192, 256, 320, 512, 576):
        cases += _across(Case(f"dim-{dim}", head_dim=dim, rows=((1, 40), (9, 21))), F32, BF16)
    cases += _across(Case("dim-192-128", head_dim=192, v_head_dim=128, rows=MIXED), F32, BF16, F16)
    cases.append(Case("dim-64-96", head_dim=64, v_head_dim=96, rows=MIXED))
    latent = {"latent": True, "num_heads": 16, "num_kv_heads": 1, "rows": ((1, 50), (4, 30))}
    cases += _across(Case("latent", head_dim=576, v_head_dim=512, **latent), F32, BF16)
    return cases


def _block_sizes() -> list[Case]:
    cases = []
    for size in (1, 2, 3, 8, 16, 32, 64, 128):
        cases += _across(Case(f"block-{size}", block_size=size, rows=MIXED), F32, BF16)
        cases.append(Case(f"block-{size}-nhd", block_size=size, rows=MIXED, layout="NHD"))
    return cases


def _features() -> list[Case]:
    long_rows = ((1, 90), (20, 75), (1, 9), (4, 4), (33, 33))
    features: list[dict[str, Any]] = [
        {"name": "window", "window": 11},
        {"name": "window-1", "window": 1},
        {"name": "window-wide", "window": 64},
        {"name": "chunk", "chunk": 24},
        {"name": "softcap", "softcap": 3.0, "spread": 2.0},
        {"name": "sinks", "sinks": True},
        {"name": "sinks-window", "sinks": True, "window": 20},
        {"name": "alibi", "alibi": True},
        {"name": "not-causal", "causal": False},
        {"name": "not-causal-window", "causal": False, "window": 13},
        {"name": "bias-float", "bias": "float"},
        {"name": "bias-bool", "bias": "bool"},
        {"name": "bias-bool-broadcast", "bias": "bool-broadcast", "softcap": 4.0},
        {"name": "bias-not-causal", "bias": "float-broadcast", "causal": False, "alibi": True},
        {"name": "holes", "holes": ((0, 1), (0, 2), (1, 0), (4, 1))},
        {"name": "all-holes", "holes": tuple((0, i) for i in range(6))},
        {"name": "holes-window", "holes": ((0, 0), (0, 1), (1, 0)), "window": 30},
        {"name": "shared", "shared_prefix": 2, "rows": ((1, 90), (20, 75), (1, 60))},
        {"name": "strided-q", "strided_q": True},
        {"name": "sharp", "spread": 6.0},
        {"name": "scale-0", "factor": 0.0, "window": 11},
        {"name": "scale-0-bias", "factor": 0.0, "bias": "bool", "sinks": True},
        {"name": "scale-negative", "factor": -0.6, "holes": ((0, 1), (1, 0))},
        {"name": "scale-negative-bias", "factor": -0.6, "bias": "bool", "softcap": 4.0},
        {"name": "everything", "softcap": 5.0, "sinks": True, "alibi": True, "window": 25,
         "bias": "float", "holes": ((0, 3),)},
    ]  # fmt: skip
    cases = []
    for feature in features:
        cases += _across(Case(**{"rows": long_rows, **feature}), F32, BF16)
    return cases


def _lengths() -> list[Case]:
    prefill = ((130, 130), (1, 1), (64, 200), (2, 2))
    padded = ((12, 5), (12, 12), (12, 0), (12, 1))  # left padding: more queries than tokens
    cases = [
        *_across(Case("mixed", rows=MIXED), F32, BF16, F16),
        *_across(Case("decode", rows=DECODE), F32, BF16, F16),
        *_across(Case("prefill", rows=prefill, num_heads=8), F32, BF16, F16),
        *_across(Case("padded", rows=padded), F32, BF16),
        *_across(Case("long-among-short", rows=((1, 3000), (1, 4), (2, 9))), F32, BF16),
        *(
            Case(f"long-among-short-{dim}", ((1, 900), (1, 4), (2, 9)), 4, 1, dim, dtype=BF16)
            for dim in (128, 256)
        ),
        *_across(Case("speculative", rows=((4, 40), (4, 17), (4, 4), (4, 90))), F32, BF16),
        Case("no-rows", rows=((0, 0),)),
        Case("one-token", rows=((1, 1),), num_heads=1, num_kv_heads=1),
    ]
    return cases


def _storage() -> list[Case]:
    fp8 = torch.float8_e4m3fn
    cases = []
    for kind in ("scalar", "head", "slot", "channel"):
        cases += _across(Case(f"fp8-{kind}", rows=MIXED, scales=kind, cache_dtype=fp8), F32, BF16)
    cases.append(Case("fp8-unscaled", rows=MIXED, cache_dtype=fp8, dtype=BF16))
    cases += _across(Case("scale-head", rows=MIXED, scales="head"), F32, BF16)
    return cases


CASES = [*_lengths(), *_groups(), *_head_dims(), *_block_sizes(), *_features(), *_storage()]
