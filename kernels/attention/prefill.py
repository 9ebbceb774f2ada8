"""Prefill: many queries a row, one program for each query tile and group, no split of the keys.

    grid (query tiles of all rows, GROUPS); a group is all heads of a KV head, or a part (decode.py)

A query tile has ROWS rows: TOKENS = ROWS // GROUP tokens with their GROUP heads. How many tiles a
row has is only known on the device, so the grid is an upper bound: row b's tiles begin at number
cu_seqlens_q[b] // TOKENS + b, which leaves a gap of at most one after each row. Tiles are taken
from the end, where causal rows see the most keys.

The keys of a tile are walked in two runs: those that only some queries see, because of a window, a
chunk or the diagonal, and then those between them that all see: no mask is computed there.

Read first: tiles.py.
"""

import triton
import triton.language as tl
from pykvcache.kernels.attention.plan import row_tiles
from pykvcache.kernels.attention.tiles import (
    CHANNEL_SCALE,
    HEAD_SCALE,
    SLOT_SCALE,
    WEIGHT_UNIT,
    attend_tiles,
    load_queries,
    smallest_unit,
    store_rows,
)
from pykvcache.kernels.common.numeric import PLAIN
from pykvcache.kernels.common.softmax import LOG2E, softmax_add_sink, softmax_finish


@triton.jit
def find_tile_row(cu_seqlens_q, rows, tile, TOKENS: tl.constexpr):
    """The last row b whose tiles begin at or before `tile`."""
    WIDTH: tl.constexpr = 128
    found = -1
    for first in range(0, rows, WIDTH):
        row = first + tl.arange(0, WIDTH)
        begin = tl.load(cu_seqlens_q + row, mask=row < rows, other=0) // TOKENS + row
        found += tl.sum(((begin <= tile) & (row < rows)).to(tl.int32), 0)
    return found


@triton.jit(
    do_not_specialize=["rows", "stride_table", "window", "chunk", "bias_stride_batch",
                       "bias_stride_head", "bias_stride_query"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q", "sinks",
                                    "alibi_slopes", "bias"],
)  # fmt: skip
def prefill_kernel(
    q, stride_q_token, stride_q_head,  # [T, HQ, D]
    k_cache, k_stride_block, k_stride_head, k_stride_slot,  # [num_blocks, HKV, block_size, D]
    v_cache, v_stride_block, v_stride_head, v_stride_slot,
    k_scale, k_scale_stride_block, k_scale_stride_head,
    v_scale, v_scale_stride_block, v_scale_stride_head,
    block_table, stride_table,  # int32 [B, max_blocks]
    seq_lens, cu_seqlens_q,  # int32 [B], [B + 1]
    sinks, alibi_slopes,  # float32 [HQ], or None
    bias, bias_stride_batch, bias_stride_head, bias_stride_query, bias_stride_key,
    out, lse,  # [T, HQ, DV], float32 [T, HQ]
    rows, scale, softcap, window, chunk,
    GROUPS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    DIM: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM1: tl.constexpr, V_DIM2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BIAS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    E4M3: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One query tile; rows of at most DECODE_ROWS query rows are left to decode."""
    TOKENS: tl.constexpr = ROWS // GROUP
    HALVES: tl.constexpr = q.dtype.element_ty == tl.float16 and E4M3 != PLAIN
    HALF_VALUES: tl.constexpr = HALVES and V_SCALE != CHANNEL_SCALE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    kv_head = (group // SPLIT).to(tl.int64)
    row = find_tile_row(cu_seqlens_q, rows, tile, TOKENS)
    row_token = tl.load(cu_seqlens_q + row)
    q_len = tl.load(cu_seqlens_q + row + 1) - row_token
    first = (tile - row_token // TOKENS - row) * TOKENS  # query of the row
    if (first < q_len) & (q_len * GROUP > DECODE_ROWS):
        seq_len = tl.load(seq_lens + row)
        r = tl.arange(0, ROWS)
        query = first + r // GROUP
        valid = (r < TOKENS * GROUP) & (query < q_len)
        head = group * GROUP + r % GROUP
        position = seq_len - q_len + query
        lowest = seq_len - q_len + first
        highest_position = seq_len - q_len + tl.minimum(first + TOKENS, q_len) - 1

        token = (row_token + query).to(tl.int64)
        q_offsets = token * stride_q_token + head.to(tl.int64) * stride_q_head
        q1 = load_queries(q, q_offsets, valid, DIM, 0, DIM1)
        q2 = q1
        if DIM2 > 0:
            q2 = load_queries(q, q_offsets, valid, DIM, DIM1, DIM2)
        score_scale, value_scale = scale, 1.0
        if K_SCALE == HEAD_SCALE:
            score_scale *= tl.load(k_scale + kv_head * k_scale_stride_head)
        if V_SCALE == HEAD_SCALE:
            value_scale *= tl.load(v_scale + kv_head * v_scale_stride_head)
        slopes = None
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + head)
        bias_offsets = head.to(tl.int64) * bias_stride_head
        bias_offsets += query.to(tl.int64) * bias_stride_query
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values1 = tl.zeros([ROWS, V_DIM1], tl.float32)
        values2 = tl.zeros([ROWS, V_DIM2 if V_DIM2 > 0 else 1], tl.float32)
        unit = smallest_unit()

        # Tiles [begin, left) are partly left of somebody's reach, [left, right) are seen by all,
        # [right, end) are partly right of the diagonal. The first and the last are one run with a
        # gap, so that there are two loops to compile and not three.
        tokens = tl.minimum(TOKENS, q_len - first)
        begin, end = row_tiles(
            highest_position + 1, tokens, window, chunk, TILE, HAS_WINDOW, HAS_CHUNK
        )
        if not CAUSAL:
            end = (seq_len + TILE - 1) // TILE
        end = tl.maximum(end, 0)
        left, right = begin, seq_len // TILE
        if CAUSAL:
            right = tl.maximum(lowest + 1, 0) // TILE
        if HAS_WINDOW:
            left = tl.maximum(
                left, (tl.maximum(highest_position - window + 1, 0) + TILE - 1) // TILE
            )
        if HAS_CHUNK:
            chunk_begin = tl.maximum(highest_position, 0) // chunk * chunk
            left = tl.maximum(left, (chunk_begin + TILE - 1) // TILE)
        if lowest < 0:
            left = end
        left = tl.minimum(left, end)
        right = tl.minimum(tl.maximum(right, left), end)
        for run in tl.static_range(2):
            if run == 0:
                run_begin, run_end, gap_begin, gap_end = begin, end, left, right
            else:
                run_begin, run_end, gap_begin, gap_end = left, right, right, right
            highest, total, values1, values2, unit = attend_tiles(
                highest, total, values1, values2, unit, q1, q2, position,
                block_table + row.to(tl.int64) * stride_table, run_begin, run_end, gap_begin,
                gap_end, seq_len,
                k_cache + kv_head * k_stride_head, k_stride_block, k_stride_slot,
                v_cache + kv_head * v_stride_head, v_stride_block, v_stride_slot,
                k_scale + kv_head * k_scale_stride_head if K_SCALE > HEAD_SCALE else k_cache,
                k_scale_stride_block,
                v_scale + kv_head * v_scale_stride_head if V_SCALE > HEAD_SCALE else v_cache,
                v_scale_stride_block,
                score_scale, softcap, window, chunk, slopes,
                bias + row.to(tl.int64) * bias_stride_batch if BIAS > 0 else q, bias_offsets,
                bias_stride_key, valid,
                DIM, DIM1, DIM2, V_DIM, V_DIM1, V_DIM2, BLOCK_SIZE, TILE,
                CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, alibi_slopes is not None, BIAS,
                K_SCALE, V_SCALE, E4M3, run == 0, INTERPRETED, q.dtype.element_ty, HALF_VALUES,
            )  # fmt: skip

        rescale = tl.full([ROWS], 1.0, tl.float32)
        if sinks is not None:
            highest, total, rescale = softmax_add_sink(
                highest, total, tl.load(sinks + head) * LOG2E
            )
        factor, row_lse = softmax_finish(highest, total)
        if HALF_VALUES and V_SCALE == SLOT_SCALE:
            value_scale *= unit
        if HALF_VALUES:
            value_scale *= WEIGHT_UNIT
        factor *= rescale * value_scale
        place = token * (GROUPS * GROUP) + head
        tl.store(lse + place, row_lse, mask=valid)
        store_rows(values1, factor, out, place * V_DIM, valid, V_DIM, 0, V_DIM1)
        if V_DIM2 > 0:
            store_rows(values2, factor, out, place * V_DIM, valid, V_DIM, V_DIM1, V_DIM2)
