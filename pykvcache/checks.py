"""Argument checks of the operators, for backends written in Python.

Every message is one line that names the argument, what it must be and what it is. The C++ backends
check the same things with csrc/check.h. With `read_values=False` only shapes, dtypes and devices
are checked: reading a value from a GPU would wait for it.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

MAX_HEAD_DIM = 576
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CACHE_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)


class Dims:
    """Named dimensions: the first tensor that mentions a name binds it, later ones must agree."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def check(self, name: str, tensor: Tensor, dims: tuple[str, ...]) -> None:
        """Raise ValueError unless `tensor` has the shape that `dims` spells."""
        wanted = f"[{', '.join(dims)}]"
        if tensor.dim() != len(dims):
            raise ValueError(f"{name} must be {wanted}, got shape {list(tensor.shape)}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            bound = self.sizes.setdefault(dim, size)
            if bound != size:
                raise ValueError(f"{name} must be {wanted}: {dim} is {bound} but got {size}")


def check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}")


def scale_kind(scale: Tensor, block_size: int, head_dim: int) -> str:
    """Which of the four shapes a scale has: "scalar", "head", "slot" or "channel".

    [num_blocks, HKV, n] is per slot when n == block_size, per channel when n == D; when both sizes
    are equal it is per slot.
    """
    if scale.dim() == 0:
        return "scalar"
    if scale.dim() == 1:
        return "head"
    return "slot" if scale.shape[-1] == block_size else "channel"


def _check_scale(name: str, scale: Tensor | None, cache: Tensor) -> None:
    if scale is None:
        return
    check_dtype(name, scale, torch.float32)
    num_blocks, heads, block_size, head_dim = cache.shape
    shapes: tuple[list[int], ...] = (
        [],
        [heads],
        [num_blocks, heads, block_size],
        [num_blocks, heads, head_dim],
    )
    if list(scale.shape) not in shapes:
        wanted = ", ".join(map(str, shapes[:-1])) + f" or {shapes[-1]}"
        raise ValueError(f"{name} must have shape {wanted}, got {list(scale.shape)}")
    if scale.dim() == 3 and cache.dtype != torch.float8_e4m3fn:
        dtype = str(cache.dtype).removeprefix("torch.")
        raise ValueError(f"{name} per block needs a float8_e4m3fn cache, got {dtype}")


def check_cache(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    read_values: bool = True,
) -> Dims:
    """Check the pool, and the block table against it; returns the dimensions bound so far."""
    dims = Dims()
    check_dtype("k_cache", k_cache, *CACHE_DTYPES)
    dims.check("k_cache", k_cache, ("num_blocks", "HKV", "block_size", "D"))
    if k_cache.shape[2] < 1:
        raise ValueError(f"block_size must be at least 1, got {k_cache.shape[2]}")
    if v_cache is not None:
        check_dtype("v_cache", v_cache, k_cache.dtype)
        dims.check("v_cache", v_cache, ("num_blocks", "HKV", "block_size", "Dv"))
        check_device("v_cache", v_cache, "k_cache", k_cache)
    if block_table is None or seq_lens is None:
        return dims
    check_dtype("block_table", block_table, torch.int32)
    check_dtype("seq_lens", seq_lens, torch.int32)
    dims.check("block_table", block_table, ("B", "max_blocks"))
    dims.check("seq_lens", seq_lens, ("B",))
    check_device("block_table", block_table, "k_cache", k_cache)
    check_device("seq_lens", seq_lens, "k_cache", k_cache)
    if read_values and seq_lens.numel() and not torch.compiler.is_compiling():
        _check_lengths(block_table, seq_lens, k_cache.shape[0], k_cache.shape[2])
    return dims


def _check_lengths(block_table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> None:
    shortest, longest = int(seq_lens.min()), int(seq_lens.max())
    if shortest < 0:
        raise ValueError(f"seq_lens must not be negative, got {shortest}")
    room = block_table.shape[1] * block_size
    if longest > room:
        raise ValueError(f"seq_lens has {longest} but block_table holds {room} tokens a row")
    first = torch.arange(block_table.shape[1], device=block_table.device) * block_size
    used = block_table[first[None] < seq_lens[:, None]]
    if not used.numel():
        return
    low, high = int(used.min()), int(used.max())
    if low < -1 or high >= num_blocks:
        bad = low if low < -1 else high
        raise ValueError(f"block_table has block {bad} but k_cache has {num_blocks}; -1 is a hole")


def check_write(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    read_values: bool = True,
) -> None:
    """Check the arguments of write_kv; nothing is written when one is wrong."""
    dims = check_cache(k_cache, v_cache, None, None)
    if (v is None) != (v_cache is None):
        raise ValueError("v and v_cache must be given together")
    check_dtype("k", k, *FLOAT_DTYPES)
    dims.check("k", k, ("T", "HKV", "D"))
    check_device("k", k, "k_cache", k_cache)
    if v is not None:
        check_dtype("v", v, k.dtype)
        dims.check("v", v, ("T", "HKV", "Dv"))
    if k_cache.dtype not in (k.dtype, torch.float8_e4m3fn):
        check_dtype("k", k, k_cache.dtype)
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    dims.check("slot_mapping", slot_mapping, ("T",))
    _check_scale("k_scale", k_scale, k_cache)
    if v_cache is not None:
        _check_scale("v_scale", v_scale, v_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache is not None and any(
            size > 1 and stride == 0
            for size, stride in zip(cache.shape, cache.stride(), strict=True)
        ):
            raise ValueError(f"{name} must not be expanded, got strides {list(cache.stride())}")
    if not read_values or not slot_mapping.numel():
        return
    num_slots = k_cache.shape[0] * k_cache.shape[2]
    low, high = int(slot_mapping.min()), int(slot_mapping.max())
    if low < -1 or high >= num_slots:
        bad = low if low < -1 else high
        raise ValueError(f"slot_mapping has slot {bad} of {num_slots}; -1 skips a token")


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v_head_dim: int,
    read_values: bool = True,
) -> None:
    """Check the arguments of paged_attention."""
    dims = check_cache(k_cache, v_cache, block_table, seq_lens, read_values)
    check_dtype("q", q, *FLOAT_DTYPES)
    dims.check("q", q, ("T", "HQ", "D"))
    check_device("q", q, "k_cache", k_cache)
    check_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    dims.check("cu_seqlens_q", cu_seqlens_q, ("B + 1",))
    if cu_seqlens_q.shape[0] != seq_lens.shape[0] + 1:
        raise ValueError(
            f"cu_seqlens_q must be [B + 1] = [{seq_lens.shape[0] + 1}], "
            f"got shape {list(cu_seqlens_q.shape)}"
        )
    longest_q, longest_kv = 0, 0
    if read_values:
        longest_q = _check_starts(cu_seqlens_q, q.shape[0], max_seqlen_q)
        longest_kv = int(seq_lens.max()) if len(seq_lens) else 0
    if 0 in (q.shape[1], k_cache.shape[1]) or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"HQ must be a multiple of HKV: got {q.shape[1]} and {k_cache.shape[1]}")
    stored = k_cache.shape[3] if v_cache is None else v_cache.shape[3]
    for name, size, limit in (("D", q.shape[2], MAX_HEAD_DIM), ("v_head_dim", v_head_dim, stored)):
        if not 1 <= size <= limit:
            raise ValueError(f"{name} must be 1 to {limit}, got {size}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    for name, value in (("window", window), ("chunk", chunk), ("softcap", softcap)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is not None:
            check_dtype(name, tensor, torch.float32)
            dims.check(name, tensor, ("HQ",))
    _check_scale("k_scale", k_scale, k_cache)
    if v_cache is not None:
        _check_scale("v_scale", v_scale, v_cache)
    if bias is not None:
        _check_bias(bias, len(seq_lens), q.shape[1], longest_q, longest_kv)


def _check_starts(cu_seqlens_q: Tensor, tokens: int, max_seqlen_q: int) -> int:
    """Check the running sum of query counts; returns the largest count."""
    starts = cu_seqlens_q.tolist()
    if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_q must rise from 0 to T = {tokens}, got {starts}")
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    if max_seqlen_q < longest:
        raise ValueError(f"max_seqlen_q is {max_seqlen_q} but a row has {longest} queries")
    return longest


def _check_bias(bias: Tensor, batch: int, heads: int, max_q: int, max_kv: int) -> None:
    check_dtype("bias", bias, *FLOAT_DTYPES, torch.bool)
    wanted = f"bias must broadcast to [B, HQ, max_q, max_kv] = {[batch, heads, max_q, max_kv]}"
    if bias.dim() != 4:
        raise ValueError(f"{wanted}, got shape {list(bias.shape)}")
    exact = bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
    enough = all(n == 1 or n >= m for n, m in zip(bias.shape[2:], (max_q, max_kv), strict=True))
    if not exact or not enough:
        raise ValueError(f"{wanted}, got shape {list(bias.shape)}")


def check_merge(outs: Tensor, lses: Tensor) -> None:
    """Check the arguments of merge_states."""
    dims = Dims()
    check_dtype("outs", outs, *FLOAT_DTYPES)
    check_dtype("lses", lses, torch.float32)
    dims.check("outs", outs, ("S", "T", "HQ", "D"))
    dims.check("lses", lses, ("S", "T", "HQ"))
    check_device("lses", lses, "outs", outs)


def check_key_starts(
    seq_lens: Tensor, cu_seqlens_k: Tensor, total_k: int, read_values: bool = True
) -> None:
    """Check the running sum of lengths of gather_kv."""
    check_dtype("cu_seqlens_k", cu_seqlens_k, torch.int32)
    if cu_seqlens_k.shape != (len(seq_lens) + 1,):
        raise ValueError(f"cu_seqlens_k must be [B + 1], got shape {list(cu_seqlens_k.shape)}")
    if not read_values:
        return
    lengths, starts = seq_lens.tolist(), cu_seqlens_k.tolist()
    expected = [0, *itertools.accumulate(lengths)]
    if starts != expected or starts[-1] > total_k:
        raise ValueError(
            f"cu_seqlens_k must be the running sum of seq_lens and end at total_k = {total_k}, "
            f"got {starts} for lengths {lengths}"
        )


def check_copy(
    src: list[Tensor], dst: list[Tensor], pairs: Tensor, read_values: bool = True
) -> None:
    """Check the arguments of copy_blocks; nothing is copied when one is wrong."""
    check_dtype("pairs", pairs, torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [N, 2], got shape {list(pairs.shape)}")
    if len(src) != len(dst):
        raise ValueError(f"src and dst must be equally long, got {len(src)} and {len(dst)} caches")
    for i, (source, target) in enumerate(zip(src, dst, strict=True)):
        check_dtype(f"dst[{i}]", target, source.dtype)
        if source.shape[1:] != target.shape[1:]:
            raise ValueError(
                f"src[{i}] and dst[{i}] must have blocks of one shape, "
                f"got {list(source.shape[1:])} and {list(target.shape[1:])}"
            )
        if pairs.numel() == 0 or not read_values:
            continue
        for name, cache, column in (("src", source, 0), ("dst", target, 1)):
            low, high = int(pairs[:, column].min()), int(pairs[:, column].max())
            if low < 0 or high >= cache.shape[0]:
                bad = low if low < 0 else high
                raise ValueError(f"pairs has block {bad} but {name}[{i}] has {cache.shape[0]}")
    if read_values and src:
        _check_copies_apart(src, dst, pairs)


def _check_copies_apart(src: list[Tensor], dst: list[Tensor], pairs: Tensor) -> None:
    """Copies run at once, so none may write what another one reads or writes."""
    targets, counts = pairs[:, 1].unique(return_counts=True)
    if len(targets) < len(pairs):
        twice = int(targets[counts > 1][0])
        raise ValueError(f"pairs has block {twice} as a destination twice")
    in_place = any(a.data_ptr() == b.data_ptr() for a, b in zip(src, dst, strict=True))
    both = targets[torch.isin(targets, pairs[:, 0])]
    if in_place and len(both):
        raise ValueError(f"pairs has block {int(both[0])} as a source and as a destination")


def check_slot_mapping(
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    num_tokens: int,
    block_size: int,
    read_values: bool = True,
) -> None:
    """Check the arguments of slot_mapping."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    dims = Dims()
    check_dtype("block_table", block_table, torch.int32)
    dims.check("block_table", block_table, ("B", "max_blocks"))
    dims.sizes["B + 1"] = dims.sizes["B"] + 1
    for name, tensor, dim in (("seq_lens", seq_lens, "B"), ("cu_seqlens_q", cu_seqlens_q, "B + 1")):
        check_dtype(name, tensor, torch.int32)
        dims.check(name, tensor, (dim,))
        check_device(name, tensor, "block_table", block_table)
    if not read_values:
        return
    lengths, starts = seq_lens.tolist(), cu_seqlens_q.tolist()
    room = block_table.shape[1] * block_size
    for row, length in enumerate(lengths):
        if not 0 <= length <= room:
            raise ValueError(
                f"seq_lens[{row}] is {length} but block_table holds 0 to {room} tokens a row"
            )
    if starts[0] != 0 or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_q must rise from 0, got {starts}")
    if starts[-1] > num_tokens:
        raise ValueError(f"cu_seqlens_q ends at {starts[-1]} but num_tokens is {num_tokens}")
