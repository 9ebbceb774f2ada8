"""Decode: rows with few queries, split along their keys over persistent programs.

    grid (PROGRAMS, GROUPS, row tiles): program p takes its even share of all units of the plan for
    one group of query heads and ROWS query rows. All heads of a KV head are one group, or SPLIT
    groups where they are many.

A program walks rows and, within a row, KV tiles. What it saw of a row is final if it saw all of it;
otherwise it stores its softmax state (values, not normalised; maximum and total; in float32) in
workspace slot p + row, which no other program uses: both numbers only ever grow from one piece to
the next. merge.py then combines the slots of each row.

Read first: plan.py, tiles.py. Read next: merge.py.
"""

import triton
import triton.language as tl
from pykvcache.kernels.attention.plan import row_tiles, sharing_programs
from pykvcache.kernels.attention.tiles import (
    CHANNEL_SCALE,
    HEAD_SCALE,
    SLOT_SCALE,
    WEIGHT_UNIT,
    attend_tiles,
    load_queries,
    queries_in_unit,
    smallest_unit,
    store_rows,
)
from pykvcache.kernels.common.addressing import find_row
from pykvcache.kernels.common.numeric import PLAIN
from pykvcache.kernels.common.softmax import LOG2E, softmax_add_sink, softmax_finish


@triton.jit(
    do_not_specialize=["rows", "part_rows", "stride_table", "window", "chunk", "bias_stride_batch",
                       "bias_stride_head", "bias_stride_query"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q", "plan", "sinks",
                                    "alibi_slopes", "bias"],
)  # fmt: skip
def decode_kernel(
    q, stride_q_token, stride_q_head,  # [T, HQ, D]
    k_cache, k_stride_block, k_stride_head, k_stride_slot,  # [num_blocks, HKV, block_size, D]
    v_cache, v_stride_block, v_stride_head, v_stride_slot,
    k_scale, k_scale_stride_block, k_scale_stride_head,
    v_scale, v_scale_stride_block, v_scale_stride_head,
    block_table, stride_table,  # int32 [B, max_blocks]
    seq_lens, cu_seqlens_q, plan,  # int32 [B], [B + 1], [B + 1]
    sinks, alibi_slopes,  # float32 [HQ], or None
    bias, bias_stride_batch, bias_stride_head, bias_stride_query, bias_stride_key,
    out, lse,  # [T, HQ, DV], float32 [T, HQ]
    part_values, part_states,  # float32 [slots, GROUPS, part_rows, DV], [..., part_rows, 2]
    part_rows,  # the most query rows that any sequence of decode has in a group
    rows, scale, softcap, window, chunk,
    GROUPS: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM1: tl.constexpr, V_DIM2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BIAS: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    E4M3: tl.constexpr, FIXED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program's share; FIXED=True takes units one by one instead of runs of them."""
    Q_DTYPE: tl.constexpr = q.dtype.element_ty
    HALVES: tl.constexpr = tl.float32 != Q_DTYPE and E4M3 != PLAIN
    HALF_KEYS: tl.constexpr = tl.bfloat16 == Q_DTYPE and HALVES and K_SCALE != CHANNEL_SCALE
    HALF_VALUES: tl.constexpr = HALVES and V_SCALE != CHANNEL_SCALE
    HAS_UNIT: tl.constexpr = HALF_VALUES and V_SCALE == SLOT_SCALE
    VALUE_DTYPE: tl.constexpr = tl.float16 if HALF_VALUES else Q_DTYPE
    program, group = tl.program_id(0), tl.program_id(1)
    kv_head = (group // SPLIT).to(tl.int64)
    units = tl.load(plan + rows)
    programs = tl.num_programs(0) if FIXED else sharing_programs(tl.num_programs(0), units)
    first_row = tl.program_id(2) * ROWS
    r = first_row + tl.arange(0, ROWS)
    head = group * GROUP + r % GROUP  # [ROWS]
    k_head = k_cache + kv_head * k_stride_head
    v_head = v_cache + kv_head * v_stride_head
    score_scale, value_scale = scale, 1.0
    if K_SCALE == HEAD_SCALE:
        score_scale *= tl.load(k_scale + kv_head * k_scale_stride_head)
    if V_SCALE == HEAD_SCALE:
        value_scale *= tl.load(v_scale + kv_head * v_scale_stride_head)
    if HALF_VALUES:
        value_scale *= WEIGHT_UNIT
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head)

    unit, stop = program, units
    if not FIXED:
        unit = tl.minimum(program.to(tl.int64) * units // programs, units).to(tl.int32)
        stop = tl.minimum((program + 1).to(tl.int64) * units // programs, units).to(tl.int32)
    while unit < stop:
        row = find_row(plan, rows, unit)
        row_begin, row_end = tl.load(plan + row), tl.load(plan + row + 1)
        unit_end = unit + 1 if FIXED else tl.minimum(stop, row_end)
        whole = (unit == row_begin) & (unit_end == row_end)

        seq_len = tl.load(seq_lens + row)
        token = tl.load(cu_seqlens_q + row)
        q_len = tl.load(cu_seqlens_q + row + 1) - token
        valid = r < q_len * GROUP
        position = seq_len - q_len + r // GROUP
        tile_begin, tile_end = row_tiles(seq_len, q_len, window, chunk, TILE, HAS_WINDOW, HAS_CHUNK)
        first_unit = tile_begin // UNIT
        piece_begin = tl.maximum(tile_begin, (first_unit + unit - row_begin) * UNIT)
        piece_end = tl.minimum(tile_end, (first_unit + unit_end - row_begin) * UNIT)
        if first_row >= q_len * GROUP:  # another sequence has more rows
            piece_end = piece_begin

        q_offsets = (token + r // GROUP).to(tl.int64) * stride_q_token
        q_offsets += head.to(tl.int64) * stride_q_head
        q1 = load_queries(q, q_offsets, valid, DIM, 0, DIM1)
        q2 = q1
        if DIM2 > 0:
            q2 = load_queries(q, q_offsets, valid, DIM, DIM1, DIM2)
        row_scale = score_scale
        if HALF_KEYS:
            q1, q2, q_unit = queries_in_unit(q1, q2, DIM2)
            row_scale = score_scale * q_unit[:, None]
        query = (r // GROUP).to(tl.int64)
        bias_offsets = head.to(tl.int64) * bias_stride_head + query * bias_stride_query
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values1 = tl.zeros([ROWS, V_DIM1], tl.float32)
        values2 = tl.zeros([ROWS, V_DIM2 if V_DIM2 > 0 else 1], tl.float32)
        highest, total, values1, values2, unit_of_values = attend_tiles(
            highest, total, values1, values2, smallest_unit(), q1, q2, position,
            block_table + row.to(tl.int64) * stride_table, piece_begin, piece_end, 0, 0, seq_len,
            k_head, k_stride_block, k_stride_slot, v_head, v_stride_block, v_stride_slot,
            k_scale + kv_head * k_scale_stride_head if K_SCALE > HEAD_SCALE else k_cache,
            k_scale_stride_block,
            v_scale + kv_head * v_scale_stride_head if V_SCALE > HEAD_SCALE else v_cache,
            v_scale_stride_block,
            row_scale, softcap, window, chunk, slopes,
            bias + row.to(tl.int64) * bias_stride_batch if BIAS > 0 else q, bias_offsets,
            bias_stride_key, valid,
            DIM, DIM1, DIM2, V_DIM, V_DIM1, V_DIM2, BLOCK_SIZE, TILE,
            CAUSAL, HAS_WINDOW, HAS_CHUNK, HAS_SOFTCAP, alibi_slopes is not None, BIAS,
            K_SCALE, V_SCALE, E4M3, True, INTERPRETED, VALUE_DTYPE, HALF_VALUES,
        )  # fmt: skip

        row_value_scale = value_scale * unit_of_values if HAS_UNIT else value_scale
        if whole:
            rescale = tl.full([ROWS], 1.0, tl.float32)
            if sinks is not None:
                sink = tl.load(sinks + head) * LOG2E
                highest, total, rescale = softmax_add_sink(highest, total, sink)
            factor, row_lse = softmax_finish(highest, total)
            factor *= rescale * row_value_scale
            place = (token + r // GROUP).to(tl.int64) * (GROUPS * GROUP) + head
            tl.store(lse + place, row_lse, mask=valid)
            store_rows(values1, factor, out, place * V_DIM, valid, V_DIM, 0, V_DIM1)
            if V_DIM2 > 0:
                store_rows(values2, factor, out, place * V_DIM, valid, V_DIM, V_DIM1, V_DIM2)
        else:
            factor = tl.zeros([ROWS], tl.float32) + row_value_scale
            slot = unit if FIXED else program + row
            first = (slot.to(tl.int64) * GROUPS + group) * part_rows
            kept = valid & (r < part_rows)  # more come only of a max_seqlen_q that is too small
            states = part_states + 2 * first
            tl.store(states + 2 * r, highest, mask=kept)
            tl.store(states + 2 * r + 1, total, mask=kept)
            place = first + r
            store_rows(values1, factor, part_values, place * V_DIM, kept, V_DIM, 0, V_DIM1)
            if V_DIM2 > 0:
                store_rows(values2, factor, part_values, place * V_DIM, kept, V_DIM, V_DIM1, V_DIM2)
        unit = unit + programs if FIXED else unit_end
