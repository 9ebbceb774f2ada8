"""Launchers: each checks its arguments, fixes what is constant for the compiler, and launches.

Nothing here waits for the GPU: lengths and block tables are never read on the host, so every
operator can be captured in a CUDA graph. In Triton's interpreter (CPU tensors) values are checked
too.

Read next: table.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from pykvcache.kernels.attention.decode import decode_kernel
from pykvcache.kernels.attention.merge import merge_kernel, merge_states_kernel
from pykvcache.kernels.attention.plan import plan_kernel
from pykvcache.kernels.attention.prefill import prefill_kernel
from pykvcache.kernels.cache.copy import copy_kernel, gather_kernel
from pykvcache.kernels.cache.write import (
    fill_channel_scales_kernel,
    slot_mapping_kernel,
    write_kernel,
)
from pykvcache.kernels.launch.table import (
    INTERPRETED,
    architecture,
    choose,
    decode_programs,
    decode_tile,
)
from torch import Tensor

from pykvcache import checks

SMALLEST_DOT = 16  # of every side of a tl.dot
FIXED_TOKENS = 1024  # of a unit when deterministic, about
COPY_WIDTH = 1024
SCALE_KINDS = {None: 0, "scalar": 1, "head": 2, "slot": 3, "channel": 4}
E4M3 = torch.float8_e4m3fn
_libraries: list[torch.library.Library] = []


def split_dim(dim: int) -> tuple[int, int]:
    """A head dim as two powers of two that cover it, the second 0 if one is enough."""
    whole: int = triton.next_power_of_2(dim)
    if whole == dim or dim <= SMALLEST_DOT:
        return max(whole, SMALLEST_DOT), 0
    first = whole // 2
    second = max(triton.next_power_of_2(dim - first), SMALLEST_DOT)
    return (whole, 0) if second == first else (first, second)


def decode_rows(group: int) -> int:
    """Query rows of a decode tile; sequences with more are prefill's."""
    return max(SMALLEST_DOT, int(triton.next_power_of_2(group)))


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}"
            )


def _stored(cache: Tensor) -> Tensor:
    """A float8 cache as bytes, which is how kernels read it."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def _scale_arguments(scale: Tensor | None, cache: Tensor) -> tuple[int, tuple[Any, ...]]:
    """(kind, (scale, stride of blocks, stride of heads))."""
    if scale is None:
        return 0, (None, 0, 0)
    kind = checks.scale_kind(scale, cache.shape[2], cache.shape[3])
    if scale.dim() == 3:
        return SCALE_KINDS[kind], (scale, scale.stride(0), scale.stride(1))
    return SCALE_KINDS[kind], (scale, 0, scale.stride(0) if scale.dim() else 0)


def _reads_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def write_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """See `pykvcache.ops.write_kv`."""
    checks.check_write(
        k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, _reads_values(k_cache)
    )
    _check_contiguous(
        k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    _write_side(k, k_cache, slot_mapping, k_scale)
    if v is not None and v_cache is not None:
        _write_side(v, v_cache, slot_mapping, v_scale)


def _write_side(x: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    tokens, heads, dim = x.shape
    if x.numel() == 0:
        return
    num_slots, block_size = cache.shape[0] * cache.shape[2], cache.shape[2]
    kind, scale_arguments = _scale_arguments(scale, cache)
    width = triton.next_power_of_2(dim)
    if kind == SCALE_KINDS["channel"]:
        fill_channel_scales_kernel[(tokens, heads)](
            x, *x.stride()[:2], *scale_arguments, slots, tokens, num_slots, dim, width, block_size
        )
    write_kernel[(tokens, heads)](
        x, *x.stride()[:2], _stored(cache), *cache.stride()[:3], *scale_arguments, slots, num_slots,
        dim, width, block_size, kind, cache.dtype == E4M3, num_warps=1,
    )  # fmt: skip


def plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    chunk: int,
    deterministic: bool,
) -> Tensor:
    """See `pykvcache.ops.plan`; int32 [B + 1], the layout is in kernels/attention/plan.py."""
    group = num_heads // num_kv_heads
    tile = decode_tile(architecture(seq_lens.device), head_dim)
    unit = _unit_tiles(tile, deterministic)
    return _plan(seq_lens, cu_seqlens_q, group, tile, unit, window, chunk)


def _unit_tiles(tile: int, deterministic: bool) -> int:
    return FIXED_TOKENS // tile if deterministic else 1


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v_head_dim: int,
    plan: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """See `pykvcache.ops.paged_attention`."""
    checks.check_attention(
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, scale, window,
        chunk, softcap, sinks, alibi_slopes, bias, k_scale, v_scale, v_head_dim, _reads_values(q),
    )  # fmt: skip
    _check_contiguous(
        q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    if v_cache is None:
        v_cache, v_scale = k_cache, k_scale
    tokens, num_heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group, rows = num_heads // kv_heads, seq_lens.shape[0]
    out = q.new_empty(tokens, num_heads, v_head_dim)
    lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
    if tokens == 0:
        return out, lse
    arch = architecture(q.device)
    k_kind, k_scale_arguments = _scale_arguments(k_scale, k_cache)
    v_kind, v_scale_arguments = _scale_arguments(v_scale, v_cache)
    bias_kind, bias_arguments = 0, (None, 0, 0, 0, 0)
    if bias is not None:
        sizes_of_one = [size == 1 for size in bias.shape]
        strides = [0 if one else s for one, s in zip(sizes_of_one, bias.stride(), strict=True)]
        bias_kind = 2 if bias.dtype == torch.bool else 1
        stored = bias.view(torch.uint8) if bias_kind == 2 else bias
        bias_arguments = (stored, *strides)
    pools = (
        _stored(k_cache), *k_cache.stride()[:3], _stored(v_cache), *v_cache.stride()[:3],
        *k_scale_arguments, *v_scale_arguments, block_table, block_table.stride(0), seq_lens,
        cu_seqlens_q,
    )  # fmt: skip
    numbers = (rows, scale, softcap, window, chunk)
    dims = (dim, *split_dim(dim), v_head_dim, *split_dim(v_head_dim), block_size)
    features = (
        causal, window > 0, chunk > 0, softcap > 0, bias_kind, k_kind, v_kind,
        k_cache.dtype == E4M3,
    )  # fmt: skip
    most_rows = decode_rows(group)
    all_prefill = tokens == rows * max_seqlen_q and max_seqlen_q * group > most_rows
    if not all_prefill:
        tile = decode_tile(arch, dim)
        unit = _unit_tiles(tile, deterministic)
        if plan is None or plan.numel() != rows + 1:
            plan = _plan(seq_lens, cu_seqlens_q, group, tile, unit, window, chunk)
        programs = decode_programs(q.device, kv_heads)
        slots = programs + rows
        if deterministic:
            slots = rows * (-(-block_table.shape[1] * block_size // (unit * tile)) + 1)
        part_values = q.new_empty(slots * kv_heads * most_rows * v_head_dim, dtype=torch.float32)
        part_lse = q.new_empty(slots * kv_heads * most_rows, dtype=torch.float32)
        choice = choose("decode", arch, dim, k_cache.element_size())
        decode_kernel[(programs, kv_heads)](
            q, *q.stride()[:2], *pools, plan, sinks, alibi_slopes, *bias_arguments, out, lse,
            part_values, part_lse, *numbers, kv_heads, group, most_rows, *dims, tile, unit,
            *features, deterministic, INTERPRETED,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        merged_rows = min(most_rows, max_seqlen_q * group)
        merge_kernel[(rows, kv_heads * merged_rows)](
            part_values, part_lse, cu_seqlens_q, plan, sinks, out, lse, rows, programs,
            kv_heads, group, most_rows, v_head_dim, triton.next_power_of_2(v_head_dim),
            deterministic, num_warps=1,
        )  # fmt: skip
    if max_seqlen_q * group > most_rows:
        choice = choose("prefill", arch, dim, k_cache.element_size())
        tile_rows = max(choice.rows, int(triton.next_power_of_2(group)))
        tiles = tokens // (tile_rows // group) + rows
        prefill_kernel[(tiles, kv_heads)](
            q, *q.stride()[:2], *pools, sinks, alibi_slopes, *bias_arguments, out, lse, *numbers,
            kv_heads, group, tile_rows, most_rows, *dims, choice.tile, *features, INTERPRETED,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
    return out, lse


def _plan(
    seq_lens: Tensor, cu_seqlens_q: Tensor, group: int, tile: int, unit: int, window: int,
    chunk: int,
) -> Tensor:  # fmt: skip
    rows = seq_lens.shape[0]
    units = torch.empty(rows + 1, dtype=torch.int32, device=seq_lens.device)
    plan_kernel[(1,)](
        seq_lens, cu_seqlens_q, units, rows, window, chunk, group, decode_rows(group), tile, unit,
        window > 0, chunk > 0,
    )  # fmt: skip
    return units


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `pykvcache.ops.merge_states`."""
    parts, tokens, heads, dim = outs.shape
    outs, lses = outs.contiguous(), lses.contiguous()
    out = outs.new_empty(tokens, heads, dim)
    lse = lses.new_empty(tokens, heads)
    if out.numel():
        merge_states_kernel[(tokens * heads,)](
            outs, lses, out, lse, parts, tokens * heads, dim, triton.next_power_of_2(dim)
        )
    return out, lse


def copy_blocks(src: list[Tensor], dst: list[Tensor], pairs: Tensor) -> None:
    """See `pykvcache.ops.copy_blocks`."""
    checks.check_copy(src, dst, pairs, _reads_values(pairs))
    for source, target in zip(src, dst, strict=True):
        whole = source.device == target.device == pairs.device
        if whole and source[:1].is_contiguous() and target[:1].is_contiguous():
            _copy_whole(_stored(source), _stored(target), pairs.contiguous())
        else:
            blocks = source[pairs[:, 0].to(source.device)]
            target[pairs[:, 1].to(target.device)] = blocks.to(target.device)


def _copy_whole(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    elements = source[:1].numel()
    if len(pairs) and elements:
        copy_kernel[(len(pairs), triton.cdiv(elements, COPY_WIDTH))](
            source, source.stride(0), target, target.stride(0), pairs, elements, COPY_WIDTH
        )


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_k: Tensor,
    total_k: int,
) -> tuple[Tensor, Tensor]:
    """See `pykvcache.ops.gather_kv`."""
    checks.check_cache(k_cache, v_cache, block_table, seq_lens, _reads_values(k_cache))
    _check_contiguous(k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    sides = []
    for cache in (k_cache, v_cache):
        if cache is None:
            sides.append(k_cache.new_empty(total_k, k_cache.shape[1], 0))
            continue
        _, heads, block_size, dim = cache.shape
        dense = torch.empty(total_k, heads, dim, dtype=cache.dtype, device=cache.device)
        if dense.numel():
            gather_kernel[(total_k, heads)](
                _stored(cache), *cache.stride()[:3], block_table, block_table.stride(0),
                cu_seqlens_k, _stored(dense), seq_lens.shape[0], total_k, dim,
                triton.next_power_of_2(dim), block_size, num_warps=1,
            )  # fmt: skip
        sides.append(dense)
    return sides[0], sides[1]


def slot_mapping(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, num_tokens: int, block_size: int
) -> Tensor:
    """See `pykvcache.ops.slot_mapping`."""
    checks.check_slot_mapping(
        block_table, seq_lens, cu_seqlens_q, num_tokens, block_size, _reads_values(block_table)
    )
    _check_contiguous(block_table=block_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    slots = torch.empty(num_tokens, dtype=torch.int64, device=block_table.device)
    if num_tokens:
        slot_mapping_kernel[(num_tokens,)](
            block_table, block_table.stride(0), block_table.shape[1], seq_lens, cu_seqlens_q, slots,
            seq_lens.shape[0], num_tokens, block_size, num_warps=1,
        )  # fmt: skip
    return slots


def register() -> None:
    """Make these the operators of namespace pykvcache_triton."""
    if _libraries:
        return
    library = torch.library.Library("pykvcache_triton", "IMPL")
    _libraries.append(library)
    operators = (
        write_kv, paged_attention, merge_states, copy_blocks, gather_kv, slot_mapping, plan,
    )  # fmt: skip
    for operator in operators:
        library.impl(operator.__name__, operator, "CUDA")
        if INTERPRETED:
            library.impl(operator.__name__, operator, "CPU")
