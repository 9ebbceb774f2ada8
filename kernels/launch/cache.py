"""Launchers of the cache's kernels: writing, copying and gathering blocks, slots of new tokens.

Nothing here waits for the GPU: lengths and block tables are never read on the host, so every
operator can be captured in a CUDA graph. In Triton's interpreter (CPU tensors) values are checked
too.
"""

from __future__ import annotations

import torch
import triton
from pykvcache.kernels.cache.copy import copy_kernel, gather_kernel
from pykvcache.kernels.cache.write import (
    fill_channel_scales_kernel,
    slot_mapping_kernel,
    write_kernel,
)
from pykvcache.kernels.launch.arguments import (
    E4M3_BYTES,
    PLAIN,
    SCALE_KINDS,
    check_contiguous,
    evenly_strided,
    reads_values,
    scale_arguments,
    stored,
)
from torch import Tensor

from pykvcache import checks

COPY_WIDTH = 1024
SCALED_ELEMENTS = 4096  # of new tokens that fill_channel_scales_kernel holds at once


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
        k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, reads_values(k_cache)
    )
    check_contiguous(
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
    x = evenly_strided(x)
    num_slots, block_size = cache.shape[0] * cache.shape[2], cache.shape[2]
    kind, of_scale = scale_arguments(scale, cache)
    width = triton.next_power_of_2(dim)
    storage = E4M3_BYTES if cache.dtype == torch.float8_e4m3fn else PLAIN
    if kind == SCALE_KINDS["channel"]:
        fill_channel_scales_kernel[(tokens, heads)](
            x, *x.stride()[:2], *of_scale, slots, tokens, num_slots, dim, width,
            SCALED_ELEMENTS // width, block_size,
        )  # fmt: skip
    write_kernel[(tokens, heads)](
        x, *x.stride()[:2], stored(cache), *cache.stride()[:3], *of_scale, slots, num_slots,
        dim, width, block_size, kind, storage, num_warps=1,
    )  # fmt: skip


def copy_blocks(src: list[Tensor], dst: list[Tensor], pairs: Tensor) -> None:
    """See `pykvcache.ops.copy_blocks`."""
    checks.check_copy(src, dst, pairs, reads_values(pairs))
    for source, target in zip(src, dst, strict=True):
        whole = source.device == target.device == pairs.device
        if whole and source[:1].is_contiguous() and target[:1].is_contiguous():
            _copy_whole(stored(source), stored(target), pairs.contiguous())
        else:
            blocks = source[pairs[:, 0].to(source.device)]
            target[pairs[:, 1].to(target.device)] = blocks.to(target.device)


def _copy_whole(source: Tensor, target: Tensor, pairs: Tensor) -> None:
    elements = source[:1].numel()
    if len(pairs) and elements:
        pieces = triton.cdiv(elements, COPY_WIDTH)
        copy_kernel[(len(pairs) * pieces,)](
            source, source.stride(0), target, target.stride(0), pairs, elements, pieces, COPY_WIDTH
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
    checks.check_cache(k_cache, v_cache, block_table, seq_lens, reads_values(k_cache))
    checks.check_key_starts(seq_lens, cu_seqlens_k, total_k, reads_values(k_cache))
    check_contiguous(k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    sides = []
    for cache in (k_cache, v_cache):
        if cache is None:
            sides.append(k_cache.new_empty(total_k, k_cache.shape[1], 0))
            continue
        _, heads, block_size, dim = cache.shape
        dense = torch.empty(total_k, heads, dim, dtype=cache.dtype, device=cache.device)
        if dense.numel():
            gather_kernel[(total_k, heads)](
                stored(cache), *cache.stride()[:3], block_table, block_table.stride(0),
                cu_seqlens_k, stored(dense), seq_lens.shape[0], total_k, dim,
                triton.next_power_of_2(dim), block_size, num_warps=1,
            )  # fmt: skip
        sides.append(dense)
    return sides[0], sides[1]


def slot_mapping(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, num_tokens: int, block_size: int
) -> Tensor:
    """See `pykvcache.ops.slot_mapping`."""
    checks.check_slot_mapping(
        block_table, seq_lens, cu_seqlens_q, num_tokens, block_size, reads_values(block_table)
    )
    check_contiguous(block_table=block_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    slots = torch.empty(num_tokens, dtype=torch.int64, device=block_table.device)
    if num_tokens:
        slot_mapping_kernel[(num_tokens,)](
            block_table, block_table.stride(0), block_table.shape[1], seq_lens, cu_seqlens_q, slots,
            seq_lens.shape[0], num_tokens, block_size, num_warps=1,
        )  # fmt: skip
    return slots
