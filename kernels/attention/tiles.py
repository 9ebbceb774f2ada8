"""Attention of a tile of query rows over a run of KV tiles: the inner loop of decode and prefill.

A query tile holds ROWS = 16 to 128 rows of one KV head: row r is query token r // GROUP with head
r % GROUP of the group, so keys and values are read once for the whole group. Head dims that are no
power of two are cut into two parts, DIM1 + DIM2 (80 = 64 + 16, 576 = 512 + 64), which pads less.
"""

import triton
import triton.language as tl
from pykvcache.kernels.common.addressing import load_blocks, slot_offsets, spread_ids
from pykvcache.kernels.common.numeric import (
    in_unit,
    inverse_of,
    load_stored,
    product,
    product_of_wide,
    unit_of,
    unit_of_rows,
)
from pykvcache.kernels.common.softmax import LOG2E, softmax_step

# Kinds of k_scale and v_scale: float32 [HKV] (or [], with a stride of 0), [num_blocks, HKV,
# block_size], [num_blocks, HKV, D]
NO_SCALE = tl.constexpr(0)
HEAD_SCALE = tl.constexpr(1)
SLOT_SCALE = tl.constexpr(2)
CHANNEL_SCALE = tl.constexpr(3)
LOWEST = tl.constexpr(-3.0e38)
# Float8 is multiplied as float16, of bfloat16 queries too: it is that after one instruction for two
# numbers, to bfloat16 it takes five, and decode then has no issue slots to spare. q is in a unit of
# its row, weights in this one, and values whose slots have scales in one that grows with these.
# Scales of channels need bfloat16's range.
WEIGHT_UNIT = tl.constexpr(2.0**-15)


@triton.jit
def smallest_unit():
    """Of values that nobody has scaled yet."""
    return unit_of(tl.zeros([], tl.float32), -1)


@triton.jit
def load_queries(q, offsets, valid, DIM: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr):
    """q [ROWS, PART]: dims FIRST to FIRST + PART of the rows at `offsets`, 0 past DIM."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    return tl.load(q + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def queries_in_unit(q1, q2, DIM2: tl.constexpr):
    """q1, q2 as float16, and their common unit [ROWS]."""
    unit = unit_of_rows(q1)
    if DIM2 > 0:
        unit = tl.maximum(unit, unit_of_rows(q2))
    first = in_unit(q1, unit)
    second = first
    if DIM2 > 0:
        second = in_unit(q2, unit)
    return first, second, unit


@triton.jit
def load_channel_scales(
    scale,  # at the head
    stride_block,
    blocks,  # int32 [N], N divides TILE: see load_blocks
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scales of a tile's tokens, float32 [TILE, PART], read once a block; 0 in holes."""
    N: tl.constexpr = blocks.shape[0]
    d = FIRST + tl.arange(0, PART)
    rows = blocks.to(tl.int64) * stride_block
    mask = (blocks >= 0)[:, None] & (d < DIM)[None, :]
    scales = tl.load(scale + rows[:, None] + d[None, :], mask=mask, other=0.0)  # [N, PART]
    spread = tl.broadcast_to(scales[:, None, :], [N, TILE // N, PART])
    return tl.reshape(spread, [TILE, PART])


@triton.jit
def load_side(
    cache,  # of K or V, at the head
    scale,  # at the head; used if KIND is CHANNEL_SCALE
    scale_stride_block,
    blocks,  # int32 [N], see load_blocks
    offsets,  # [TILE]
    valid,  # [TILE]
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    E4M3: tl.constexpr,
    KIND: tl.constexpr,
):
    """[TILE, PART] of a cache in DTYPE; 0 where a token is not there, whatever memory holds."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    if KIND == CHANNEL_SCALE:
        x = load_stored(cache + offsets[:, None] + d[None, :], mask, tl.float32, E4M3)
        x *= load_channel_scales(scale, scale_stride_block, blocks, DIM, FIRST, PART, TILE)
        return x.to(DTYPE)
    return load_stored(cache + offsets[:, None] + d[None, :], mask, DTYPE, E4M3)


@triton.jit
def tanh(x):
    """Near 0 by its series, as 1 - 2 / (e^2x + 1) has no digits left there; NaN stays NaN."""
    square = x * x
    series = x * (1.0 + square * (square * (2.0 / 15.0) - 1.0 / 3.0))
    bounded = tl.where(x > 15.0, 15.0, x)
    far = 1.0 - 2.0 / (tl.exp2(bounded * (2.0 * LOG2E)) + 1.0)
    return tl.where(square < 1.0 / 64.0, series, far)


@triton.jit
def attend_tiles(
    highest, total, values1, values2,  # state: [ROWS], [ROWS], [ROWS, V_DIM1], [ROWS, V_DIM2]
    unit,  # of values
    q1, q2,  # [ROWS, DIM1], [ROWS, DIM2]
    position,  # int32 [ROWS], of the queries; negative: sees nothing
    table,  # block_table of the row
    tile_begin, tile_end, gap_begin, gap_end,  # tiles; those of the gap are left out
    kv_end,  # the row's length
    k_cache, k_stride_block, k_stride_slot,  # at the KV head
    v_cache, v_stride_block, v_stride_slot,
    k_scale, k_scale_stride_block, v_scale, v_scale_stride_block,  # at the KV head
    scale,  # a number, or one a row, [ROWS, 1]
    softcap, window, chunk,
    slopes,  # [ROWS], or None
    bias, bias_offsets, bias_stride_key,  # at the batch row; [ROWS]
    row_valid,  # [ROWS]: rows that have a bias
    DIM: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM1: tl.constexpr, V_DIM2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BIAS: tl.constexpr,  # 0 none, 1 float, 2 bool
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    E4M3: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
    DTYPE: tl.constexpr,  # of V and weights; these are in WEIGHT_UNIT if HALF_VALUES
    HALF_VALUES: tl.constexpr,
):  # fmt: skip
    """Take KV tiles [tile_begin, tile_end) into the state, those of [gap_begin, gap_end) left out.

    MASKED=False promises that every query sees every key of these tiles; holes are masked anyhow.
    """
    # A key times its channel's scale needs more digits than bfloat16 has.
    WIDE_KEYS: tl.constexpr = K_SCALE == CHANNEL_SCALE and q1.dtype != tl.float32
    KEY_DTYPE: tl.constexpr = tl.float32 if WIDE_KEYS else q1.dtype
    lane = tl.arange(0, TILE)
    gap = gap_end - gap_begin
    next_start = (tile_begin + tl.where(tile_begin >= gap_begin, gap, 0)) * TILE
    next_blocks = load_blocks(table, next_start, kv_end, BLOCK_SIZE, TILE)
    for number in range(tile_begin, tile_end - gap):
        # Ids are loaded one tile ahead: K and V would wait for them otherwise.
        start = (number + tl.where(number >= gap_begin, gap, 0)) * TILE
        blocks = next_blocks
        next_start = (number + 1 + tl.where(number + 1 >= gap_begin, gap, 0)) * TILE
        next_blocks = load_blocks(table, next_start, kv_end, BLOCK_SIZE, TILE)
        ids = spread_ids(blocks, start, kv_end, TILE)
        valid = ids >= 0

        offsets = slot_offsets(ids, start, k_stride_block, k_stride_slot, BLOCK_SIZE)
        keys = load_side(
            k_cache, k_scale, k_scale_stride_block, blocks, offsets, valid, DIM, 0, DIM1, TILE,
            KEY_DTYPE, E4M3, K_SCALE,
        )  # fmt: skip
        if WIDE_KEYS:
            scores = product_of_wide(q1, keys, E4M3, INTERPRETED)  # [ROWS, TILE]
        else:
            scores = product(q1, tl.trans(keys), INTERPRETED)
        if DIM2 > 0:
            keys = load_side(
                k_cache, k_scale, k_scale_stride_block, blocks, offsets, valid, DIM, DIM1, DIM2,
                TILE, KEY_DTYPE, E4M3, K_SCALE,
            )  # fmt: skip
            if WIDE_KEYS:
                scores += product_of_wide(q2, keys, E4M3, INTERPRETED)
            else:
                scores += product(q2, tl.trans(keys), INTERPRETED)
        slot = (start + lane) % BLOCK_SIZE
        if K_SCALE == SLOT_SCALE:
            at = k_scale + tl.maximum(ids, 0).to(tl.int64) * k_scale_stride_block + slot
            scores *= tl.load(at, mask=valid, other=0.0)[None, :]

        key_position = start + lane
        distance = key_position[None, :] - position[:, None]
        if HAS_SOFTCAP:
            scores = softcap * LOG2E * tanh(scores * (scale / softcap))
        else:
            scores *= scale * LOG2E
        if HAS_SLOPES:
            scores += slopes[:, None] * LOG2E * distance.to(tl.float32)
        visible = valid[None, :]
        if MASKED:
            visible &= (position >= 0)[:, None]
            if CAUSAL:
                visible &= distance <= 0
            if HAS_WINDOW:
                visible &= distance > -window
            if HAS_CHUNK:
                visible &= key_position[None, :] >= (position // chunk * chunk)[:, None]
        if BIAS > 0:
            at = bias + bias_offsets[:, None] + key_position[None, :].to(tl.int64) * bias_stride_key
            seen = visible & row_valid[:, None]
            if BIAS == 2:
                visible = seen & (tl.load(at, mask=seen, other=0) != 0)
            else:
                addend = tl.load(at, mask=seen, other=0.0).to(tl.float32)
                # The lowest float must not become -inf, which would say that nothing is seen, and
                # NaN must stay.
                lowest = (addend * LOG2E < LOWEST) & (addend != float("-inf"))
                scores += tl.where(lowest, LOWEST, addend * LOG2E)
        scores = tl.where(visible, scores, float("-inf"))

        highest, total, weights, factor = softmax_step(highest, total, scores)
        offsets = slot_offsets(ids, start, v_stride_block, v_stride_slot, BLOCK_SIZE)
        if V_SCALE == SLOT_SCALE:
            at = v_scale + tl.maximum(ids, 0).to(tl.int64) * v_scale_stride_block + slot
            scales = tl.load(at, mask=valid, other=0.0)
            if HALF_VALUES:
                before = unit
                unit = tl.maximum(before, unit_of(tl.max(tl.abs(scales), 0), -1))
                factor *= before * inverse_of(unit)
                scales *= inverse_of(unit)
            weights *= scales[None, :]
        if HALF_VALUES:
            weights *= 1.0 / WEIGHT_UNIT
        weights = weights.to(DTYPE)
        part = load_side(
            v_cache, v_scale, v_scale_stride_block, blocks, offsets, valid, V_DIM, 0, V_DIM1, TILE,
            DTYPE, E4M3, V_SCALE,
        )  # fmt: skip
        values1 = values1 * factor[:, None] + product(weights, part, INTERPRETED)
        if V_DIM2 > 0:
            part = load_side(
                v_cache, v_scale, v_scale_stride_block, blocks, offsets, valid, V_DIM, V_DIM1,
                V_DIM2, TILE, DTYPE, E4M3, V_SCALE,
            )  # fmt: skip
            values2 = values2 * factor[:, None] + product(weights, part, INTERPRETED)
    return highest, total, values1, values2, unit


@triton.jit
def store_rows(
    values, factor, out, offsets, valid, DIM: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr
):
    """values [ROWS, PART] times factor [ROWS] to rows of `out` at `offsets`."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    pointers = out + offsets[:, None] + d[None, :]
    tl.store(pointers, (values * factor[:, None]).to(out.dtype.element_ty), mask=mask)
