"""Launchers of attention: sizes, what is constant for the compiler, launch.

Nothing here waits for the GPU: lengths and block tables are never read on the host, so every
operator can be captured in a CUDA graph. In Triton's interpreter (CPU tensors) values are checked
too.

Read next: table.py.
"""

from __future__ import annotations

import torch
import triton
from pykvcache.kernels.attention.decode import decode_kernel
from pykvcache.kernels.attention.merge import merge_kernel, merge_states_kernel
from pykvcache.kernels.attention.plan import plan_kernel
from pykvcache.kernels.attention.prefill import prefill_kernel
from pykvcache.kernels.launch.arguments import (
    check_contiguous,
    evenly_strided,
    reads_values,
    scale_arguments,
    storage_kind,
    stored,
)
from pykvcache.kernels.launch.table import (
    INTERPRETED,
    architecture,
    choose,
    decode_programs,
    decode_tile,
    processors,
)
from torch import Tensor

from pykvcache import checks

SMALLEST_DOT = 16  # of every side of a tl.dot
FIXED_TOKENS = 1024  # of a unit when deterministic, about
MERGED_PIECES = 16  # at once, and
MERGED_NUMBERS = 8192  # of them: more do not fit the registers
# Query rows of a decode tile, by head dim: more do not fit the registers of one program.
MOST_ROWS = ((128, 64), (256, 32), (576, 16))
FEWEST_HEADS = 8  # of a group that heads are split into
MOST_ROW_TILES = 8  # of a sequence of decode


def split_dim(dim: int) -> tuple[int, int]:
    """A head dim as two powers of two that cover it, the second 0 if one is enough."""
    whole: int = triton.next_power_of_2(dim)
    if whole == dim or dim <= SMALLEST_DOT:
        return max(whole, SMALLEST_DOT), 0
    first = whole // 2
    second = max(triton.next_power_of_2(dim - first), SMALLEST_DOT)
    return (whole, 0) if second == first else (first, second)


def head_split(heads: int, dim: int) -> int:
    """Groups that the query heads of one KV head are cut into; each reads the keys for itself."""
    limit = next(rows for largest, rows in MOST_ROWS if dim <= largest)
    split = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= limit)
    return split if split == 1 or heads // split >= FEWEST_HEADS else 1


def row_tile(group: int) -> int:
    """Query rows of a decode program."""
    return max(SMALLEST_DOT, int(triton.next_power_of_2(group)))


def decode_rows(
    group: int, columns: int, max_seqlen_q: int, deterministic: bool, device: torch.device
) -> int:
    """The most query rows that a sequence of decode has; those with more are prefill's.

    One row tile. Prefill has one program for a query tile and group of heads; where these are few
    and there are processors for a program of each row tile, all sequences of the call are decode's:
    speculative tokens, or the end of a prompt whose beginning is cached. It depends on the batch,
    and so does not happen when deterministic.

    Args:
        group: query heads of a program.
        columns: sequences times groups.
    """
    tile = row_tile(group)
    tiles = -(-max_seqlen_q * group // tile)
    most = min(MOST_ROW_TILES, processors(device) * 3 // 4 // max(columns, 1))
    return tile * tiles if not deterministic and 1 < tiles <= most else tile


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
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads: got {num_heads} and {num_kv_heads}"
        )
    if window < 0 or chunk < 0:
        raise ValueError(f"window and chunk must not be negative, got {window} and {chunk}")
    checks.check_dtype("seq_lens", seq_lens, torch.int32)
    checks.check_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    check_contiguous(seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    split = head_split(num_heads // num_kv_heads, head_dim)
    group, columns = num_heads // num_kv_heads // split, len(seq_lens) * num_kv_heads * split
    most_rows = decode_rows(group, columns, max_seqlen_q, deterministic, seq_lens.device)
    tile = decode_tile(architecture(seq_lens.device), head_dim)
    unit = _unit_tiles(tile, deterministic)
    return _plan(seq_lens, cu_seqlens_q, group, most_rows, tile, unit, window, chunk)


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
        chunk, softcap, sinks, alibi_slopes, bias, k_scale, v_scale, v_head_dim, reads_values(q),
    )  # fmt: skip
    check_contiguous(
        q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table, seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale,
        v_scale=v_scale,
    )  # fmt: skip
    if v_cache is None:
        v_cache, v_scale = k_cache, k_scale
    tokens, num_heads, dim = q.shape
    q = evenly_strided(q)
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    rows, split = seq_lens.shape[0], head_split(num_heads // kv_heads, dim)
    groups, group = kv_heads * split, num_heads // kv_heads // split
    out = q.new_empty(tokens, num_heads, v_head_dim)
    lse = q.new_empty(tokens, num_heads, dtype=torch.float32)
    if tokens == 0:
        return out, lse
    arch = architecture(q.device)
    k_kind, of_k_scale = scale_arguments(k_scale, k_cache)
    v_kind, of_v_scale = scale_arguments(v_scale, v_cache)
    bias_kind, bias_arguments = 0, (None, 0, 0, 0, 0)
    if bias is not None:
        sizes_of_one = [size == 1 for size in bias.shape]
        strides = [0 if one else s for one, s in zip(sizes_of_one, bias.stride(), strict=True)]
        bias_kind = 2 if bias.dtype == torch.bool else 1
        bias_arguments = (bias.view(torch.uint8) if bias_kind == 2 else bias, *strides)
    pools = (
        stored(k_cache), *k_cache.stride()[:3], stored(v_cache), *v_cache.stride()[:3],
        *of_k_scale, *of_v_scale, block_table, block_table.stride(0), seq_lens,
        cu_seqlens_q,
    )  # fmt: skip
    numbers = (rows, scale, softcap, window, chunk)
    dims = (dim, *split_dim(dim), v_head_dim, *split_dim(v_head_dim), block_size)
    features = (
        causal, window > 0, chunk > 0, softcap > 0, bias_kind, k_kind, v_kind,
        storage_kind(k_cache, arch),
    )  # fmt: skip
    # Products in float32 need the tiles of float32, whatever the cache stores.
    size = max(k_cache.element_size(), q.element_size() if q.dtype == torch.float32 else 1)
    most_rows = decode_rows(group, rows * groups, max_seqlen_q, deterministic, q.device)
    all_prefill = tokens == rows * max_seqlen_q and max_seqlen_q * group > most_rows
    if not all_prefill:
        tile = decode_tile(arch, dim)
        unit = _unit_tiles(tile, deterministic)
        if plan is None or plan.numel() != rows + 1:
            plan = _plan(seq_lens, cu_seqlens_q, group, most_rows, tile, unit, window, chunk)
        tile_rows = row_tile(group)
        part_rows = min(most_rows, max_seqlen_q * group)
        row_tiles = -(-part_rows // tile_rows)
        programs = decode_programs(q.device, groups * row_tiles)
        slots = programs + rows
        if deterministic:
            slots = rows * (-(-block_table.shape[1] * block_size // (unit * tile)) + 1)
        parts = slots * groups * part_rows
        part_values = q.new_empty(parts * v_head_dim, dtype=torch.float32)
        part_states = q.new_empty(parts * 2, dtype=torch.float32)
        choice = choose("decode", arch, max(dim, v_head_dim), size)
        decode_kernel[(programs, groups, row_tiles)](
            q, *q.stride()[:2], *pools, plan, sinks, alibi_slopes, *bias_arguments, out, lse,
            part_values, part_states, part_rows, *numbers, groups, split, group, tile_rows, *dims,
            tile, unit, *features, deterministic, INTERPRETED,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
        width = triton.next_power_of_2(v_head_dim)
        pieces = min(MERGED_PIECES, MERGED_NUMBERS // width)
        merge_kernel[(rows, groups * part_rows)](
            part_values, part_states, cu_seqlens_q, plan, sinks, out, lse, rows, programs,
            part_rows, groups, group, v_head_dim, width, pieces, deterministic,
            num_warps=max(width // 64, 1),
        )  # fmt: skip
    if max_seqlen_q * group > most_rows:
        choice = choose("prefill", arch, max(dim, v_head_dim), size)
        tile_rows = max(choice.rows, int(triton.next_power_of_2(group)))
        tiles = tokens // (tile_rows // group) + rows
        prefill_kernel[(tiles, groups)](
            q, *q.stride()[:2], *pools, sinks, alibi_slopes, *bias_arguments, out, lse, *numbers,
            groups, split, group, tile_rows, most_rows, *dims, choice.tile, *features, INTERPRETED,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
    return out, lse


def _plan(
    seq_lens: Tensor, cu_seqlens_q: Tensor, group: int, most_rows: int, tile: int, unit: int,
    window: int, chunk: int,
) -> Tensor:  # fmt: skip
    rows = seq_lens.shape[0]
    units = torch.empty(rows + 1, dtype=torch.int32, device=seq_lens.device)
    plan_kernel[(1,)](
        seq_lens, cu_seqlens_q, units, rows, most_rows, window, chunk, group, tile, unit,
        window > 0, chunk > 0,
    )  # fmt: skip
    return units


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `pykvcache.ops.merge_states`."""
    checks.check_merge(outs, lses)
    parts, tokens, heads, dim = outs.shape
    outs, lses = outs.contiguous(), lses.contiguous()
    out = outs.new_empty(tokens, heads, dim)
    lse = lses.new_empty(tokens, heads)
    if out.numel():
        merge_states_kernel[(tokens * heads,)](
            outs, lses, out, lse, parts, tokens * heads, dim, triton.next_power_of_2(dim)
        )
    return out, lse
