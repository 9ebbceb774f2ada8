"""Calls that make the Triton launchers launch every kernel in every form it has.

Each dtype and class of head dims is called with each value of each feature. Features do not depend
on each other, so a call takes one value of each, and as many calls as the longest list has cover
them all. Some combinations are only called plainly: float16 is compiled like bfloat16, 80 like 576
(both are cut in two parts), and float32 over float8 like float32.
`test_triton_compile.py` checks that no parameter of `ops.paged_attention`, no kernel and no
compile-time constant of a kernel is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from pykvcache.kernels.launch import attention, cache
from torch import Tensor
from triton_launches import TARGETS, Launch, noting_launches

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {BF16: "bf16", F16: "fp16", F32: "fp32", FP8: "fp8"}
# dtype of q, dtype of the caches
DTYPES = ((BF16, BF16), (F16, F16), (F32, F32), (BF16, FP8), (F16, FP8), (F32, FP8))
# One of each class: 80 and 576 are cut in two parts.
HEAD_DIMS = (64, 80, 128, 256, 576)
KV_HEADS, ROWS, BLOCKS = 8, 4, 32

# By parameter of ops.paged_attention, or by what decides a constant: the values that differ for the
# compiler. The first is the plain one.
FEATURES: dict[str, tuple[Any, ...]] = {
    "causal": (True, True, False),
    "window": (0, 100),
    "chunk": (0, 0, 100),
    "softcap": (0.0, 30.0),
    "sinks": (False, False, True),
    "alibi_slopes": (False, True),
    "bias": ("", "", "float", "bool"),
    "scales": ("", "head", "slot", "channel"),
    "deterministic": (False, False, False, True),
    "block_size": (16, 1, 3, 192),
    "group": (4, 7, 128, 1),
}
CALLS = max(map(len, FEATURES.values()))
PLAIN = {name: values[0] for name, values in FEATURES.items()}


@dataclass(frozen=True)
class Call:
    """A call of paged_attention: one decode token, or many tokens, in each row."""

    phase: str  # "decode" or "prefill"
    dtype: torch.dtype
    cache_dtype: torch.dtype
    dim: int
    features: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        changed = [
            f"{name}={value}" for name, value in self.features.items() if value != PLAIN[name]
        ]
        dtypes = f"{NAMES[self.dtype]}/{NAMES[self.cache_dtype]}"
        return " ".join([self.phase, dtypes, str(self.dim), *changed])


def feature_calls(phase: str, dtype: torch.dtype, cache_dtype: torch.dtype, dim: int) -> list[Call]:
    """Calls that together have every value of every feature, the plain one first."""
    calls = []
    for number in range(CALLS):
        features = {name: values[number % len(values)] for name, values in FEATURES.items()}
        if cache_dtype != FP8 and features["scales"]:
            features["scales"] = "head"  # those of a block are for float8
        calls.append(Call(phase, dtype, cache_dtype, dim, features))
    return calls


def empty(*shape: int, dtype: torch.dtype = F32, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def attend(call: Call) -> None:
    """Make the call on tensors without memory."""
    features, block_size = call.features, call.features["block_size"]
    heads, queries = KV_HEADS * features["group"], 1 if call.phase == "decode" else 512
    tokens, shape = ROWS * queries, (BLOCKS, KV_HEADS, block_size, call.dim)
    scale_shapes: dict[str, tuple[int, ...]] = {
        "head": (KV_HEADS,), "slot": shape[:3], "channel": (*shape[:2], call.dim),
    }  # fmt: skip
    kind = features["scales"]
    k_scale, v_scale = (empty(*scale_shapes[kind]) if kind else None for _ in range(2))
    bias = None
    if features["bias"]:
        dtype = torch.bool if features["bias"] == "bool" else call.dtype
        bias = empty(ROWS, heads, queries, BLOCKS * block_size, dtype=dtype)
    k_cache, v_cache = (empty(*shape, dtype=call.cache_dtype) for _ in range(2))
    table = empty(ROWS, BLOCKS, dtype=torch.int32)
    seq_lens = empty(ROWS, dtype=torch.int32)
    starts = empty(ROWS + 1, dtype=torch.int32)
    attention.paged_attention(
        empty(tokens, heads, call.dim, dtype=call.dtype), k_cache, v_cache, table, seq_lens, starts,
        queries, 0.1, features["causal"], features["window"], features["chunk"],
        features["softcap"], empty(heads) if features["sinks"] else None,
        empty(heads) if features["alibi_slopes"] else None, bias, k_scale, v_scale, call.dim, None,
        features["deterministic"],
    )  # fmt: skip


def use_cache(dtype: torch.dtype, cache_dtype: torch.dtype, dim: int, block_size: int) -> None:
    """The other operators: writing with every kind of scale, copying, gathering, slots, merging."""
    shape = (BLOCKS, KV_HEADS, block_size, dim)
    x, pool = empty(ROWS, KV_HEADS, dim, dtype=dtype), empty(*shape, dtype=cache_dtype)
    slots = empty(ROWS, dtype=torch.int64)
    scales = [None, empty(KV_HEADS)]
    if cache_dtype == FP8:
        scales += [empty(*shape[:3]), empty(*shape[:2], dim)]
    for scale in scales:
        cache.write_kv(x, x, pool, pool, slots, scale, scale)
    table = empty(ROWS, BLOCKS, dtype=torch.int32)
    where = (table, empty(ROWS, dtype=torch.int32), empty(ROWS + 1, dtype=torch.int32))
    cache.slot_mapping(*where, ROWS, block_size)
    cache.gather_kv(pool, pool, *where, ROWS)
    cache.copy_blocks([pool], [pool], empty(3, 2, dtype=torch.int64))
    attention.merge_states(empty(3, ROWS, KV_HEADS, dim, dtype=dtype), empty(3, ROWS, KV_HEADS))


def attention_calls() -> Iterator[Call]:
    """All of them."""
    for phase in ("decode", "prefill"):
        for dtype, cache_dtype in DTYPES:
            for dim in HEAD_DIMS:
                calls = feature_calls(phase, dtype, cache_dtype, dim)
                alike = dtype == F16 or (dtype, cache_dtype) == (F32, FP8)
                once = dim == 80 or (alike and dim != 128)
                yield from calls[:1] if once else calls
            yield from scale_calls(phase, dtype, cache_dtype)


def scale_calls(phase: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> Iterator[Call]:
    """Float8 in all forms and nothing else, where kernels must not spill."""
    if (dtype, cache_dtype) == (BF16, FP8):
        for dim in (64, 128):
            for kind in FEATURES["scales"][1:]:
                yield Call(phase, dtype, cache_dtype, dim, {**PLAIN, "scales": kind})


def quick_calls(arch: str) -> Iterator[Call]:
    """A part for every day: plain calls of all dtypes and head dims, and each feature's values with
    one of them, another one on every chip."""
    number = list(TARGETS).index(arch)
    for phase in ("decode", "prefill"):
        for i, (dtype, cache_dtype) in enumerate(DTYPES):
            for j, dim in enumerate(HEAD_DIMS):
                if dim == 128 or (i + j + number) % 3 == 0:
                    yield feature_calls(phase, dtype, cache_dtype, dim)[0]
        yield from feature_calls(phase, BF16, BF16, (64, 128)[number % 2])[1:]
        yield from feature_calls(phase, BF16, FP8, (128, 64)[number % 2])[1:]
        yield from scale_calls(phase, BF16, FP8)


def one_call_of_each_kind(
    cache_dtype: torch.dtype, rows: int, width: int, blocks: int, queries: int, shift: int,
    dim: int = 64,
) -> None:  # fmt: skip
    """A step of decode, a mixed batch and the cache's operators, for one model and one layout.

    What is small lies `shift` elements after an aligned address. Queries, keys and values are views
    of [heads, T, D], as transformers leaves them.
    """

    def small(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        size = math.prod(shape)
        return empty(size + 1, dtype=dtype, device="cpu")[shift : size + shift].view(shape)

    def tokens_of(heads: int) -> Tensor:
        return empty(heads, tokens, dim, dtype=BF16, device="cpu").transpose(0, 1)

    heads, kv_heads, block_size = 32, 8, 16
    shape = (blocks, kv_heads, block_size, dim)
    k_cache, v_cache = (empty(*shape, dtype=cache_dtype, device="cpu") for _ in range(2))
    scale = empty(*shape[:2], dim, device="cpu") if cache_dtype == FP8 else None
    table, seq_lens, starts = small(rows, width), small(rows), small(rows + 1)
    for tokens, longest in ((rows, 1), (rows * queries + 8, queries + 8)):
        plan = attention.plan(seq_lens, starts, longest, heads, kv_heads, dim, rows, 0, False)
        bias = small(rows, 1, longest, width * block_size, dtype=torch.bool)
        for mask in (None, bias):
            attention.paged_attention(
                tokens_of(heads), k_cache, v_cache, table, seq_lens, starts, longest, 0.125 + rows,
                True, rows, 0, 0.0, small(heads, dtype=F32), None, mask, scale, scale, dim, plan,
                False,
            )  # fmt: skip
        k = tokens_of(kv_heads)
        slots = small(tokens, dtype=torch.int64)
        cache.write_kv(k, k, k_cache, v_cache, slots, scale, scale)
        cache.slot_mapping(table, seq_lens, starts, tokens, block_size)
        cache.gather_kv(k_cache, v_cache, table, seq_lens, starts, tokens)
        parts = empty(rows + 1, tokens, heads, dim, dtype=BF16, device="cpu")
        attention.merge_states(parts, empty(rows + 1, tokens, heads, device="cpu"))
    cache.copy_blocks([k_cache], [v_cache], small(rows, 2, dtype=torch.int64))


def launches_of(arch: str, calls: list[Call]) -> dict[str, tuple[str, Launch]]:
    """(name, launch) of every different kernel that the calls and the cache's operators launch.

    The cache's kernels are taken with all dtypes, each with two of the head dims and block sizes.
    """
    found: dict[str, tuple[str, Launch]] = {}
    for call in calls:
        with noting_launches(arch) as noted:
            attend(call)
        for launch in noted:
            found.setdefault(launch.key, (str(call), launch))
    sizes = ((64, 16), (80, 1), (128, 3), (576, 192))
    for i, (dtype, cache_dtype) in enumerate(DTYPES):
        for dim, block_size in (sizes[i % 4], sizes[(i + 1) % 4]):
            with noting_launches(arch) as noted:
                use_cache(dtype, cache_dtype, dim, block_size)
            name = f"cache {NAMES[dtype]}/{NAMES[cache_dtype]} {dim}"
            for launch in noted:
                found.setdefault(launch.key, (name, launch))
    return found
