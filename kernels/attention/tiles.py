"""Attention of a tile of query rows over a run of KV tiles: the inner loop of decode and prefill.

A query tile holds ROWS = 16 to 128 rows of one KV head: row r is query token r // GROUP with head
r % GROUP of the group, so keys and values are read once for the whole group. Head dims that are no
power of two are cut into two parts, DIM1 + DIM2 (80 = 64 + 16, 576 = 512 + 64), which pads less.
"""

import triton
import triton.language as tl
from pykvcache.kernels.common.addressing import load_block_ids, slot_offsets
from pykvcache.kernels.common.numeric import load_stored, product
from pykvcache.kernels.common.softmax import softmax_step

# Kinds of k_scale and v_scale: float32 [], [HKV], [num_blocks, HKV, block_size], [num_blocks, HKV,
# D]
NO_SCALE = tl.constexpr(0)
SCALAR_SCALE = tl.constexpr(1)
HEAD_SCALE = tl.constexpr(2)
SLOT_SCALE = tl.constexpr(3)
CHANNEL_SCALE = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def load_queries(q, offsets, valid, DIM: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr):
    """q [ROWS, PART]: dims FIRST to FIRST + PART of the rows at `offsets`, 0 past DIM."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    return tl.load(q + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_side(
    cache,  # of K or V, at the head
    scale,  # at the head; used if KIND is CHANNEL_SCALE
    offsets,  # [TILE]
    blocks,  # int64 [TILE], times the stride of the scale's blocks
    valid,  # [TILE]
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    DTYPE: tl.constexpr,
    IS_E4M3: tl.constexpr,
    KIND: tl.constexpr,
):
    """[TILE, PART] of a cache in DTYPE; 0 where a token is not there, whatever memory holds."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    if KIND == CHANNEL_SCALE:
        x = load_stored(cache + offsets[:, None] + d[None, :], mask, tl.float32, IS_E4M3)
        factor = tl.load(scale + blocks[:, None] + d[None, :], mask=mask, other=0.0)
        return (x * factor).to(DTYPE)
    return load_stored(cache + offsets[:, None] + d[None, :], mask, DTYPE, IS_E4M3)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(tl.minimum(x, 15.0) * (2.0 * LOG2E)) + 1.0)


@triton.jit
def attend_tiles(
    highest, total, values1, values2,  # state: [ROWS], [ROWS], [ROWS, V_DIM1], [ROWS, V_DIM2]
    q1, q2,  # [ROWS, DIM1], [ROWS, DIM2]
    position,  # int32 [ROWS], of the queries; negative: sees nothing
    table,  # block_table of the row
    tile_begin, tile_end, kv_end,  # tiles, and the row's length
    k_cache, k_stride_block, k_stride_slot,  # at the KV head
    v_cache, v_stride_block, v_stride_slot,
    k_scale, k_scale_stride_block, v_scale, v_scale_stride_block,  # at the KV head
    scale, softcap, window, chunk,
    slopes,  # [ROWS], or None
    bias, bias_offsets, bias_stride_key,  # at the batch row; [ROWS]
    row_valid,  # [ROWS]
    DIM: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    V_DIM: tl.constexpr, V_DIM1: tl.constexpr, V_DIM2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BIAS: tl.constexpr,  # 0 none, 1 float, 2 bool
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    IS_E4M3: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Take KV tiles [tile_begin, tile_end) into the state.

    MASKED=False promises that every query sees every key of these tiles; holes are masked anyhow.
    """
    DTYPE: tl.constexpr = q1.dtype
    # A key times its channel's scale needs more digits than bfloat16 has.
    KEY_DTYPE: tl.constexpr = tl.float32 if K_SCALE == CHANNEL_SCALE else q1.dtype
    lane = tl.arange(0, TILE)
    next_ids = load_block_ids(table, tile_begin * TILE, kv_end, BLOCK_SIZE, TILE)
    for tile in range(tile_begin, tile_end):
        # Ids are loaded one tile ahead: K and V would wait for them otherwise.
        start = tile * TILE
        ids = next_ids
        next_ids = load_block_ids(table, start + TILE, kv_end, BLOCK_SIZE, TILE)
        valid = ids >= 0
        safe_ids = tl.maximum(ids, 0).to(tl.int64)

        offsets = slot_offsets(ids, start, k_stride_block, k_stride_slot, BLOCK_SIZE)
        blocks = safe_ids * k_scale_stride_block
        keys = load_side(
            k_cache, k_scale, offsets, blocks, valid, DIM, 0, DIM1, KEY_DTYPE, IS_E4M3, K_SCALE
        )
        scores = product(q1.to(KEY_DTYPE), tl.trans(keys), INTERPRETED)  # [ROWS, TILE]
        if DIM2 > 0:
            keys = load_side(
                k_cache, k_scale, offsets, blocks, valid, DIM, DIM1, DIM2, KEY_DTYPE, IS_E4M3,
                K_SCALE,
            )  # fmt: skip
            scores += product(q2.to(KEY_DTYPE), tl.trans(keys), INTERPRETED)
        slot = (start + lane) % BLOCK_SIZE
        if K_SCALE == SLOT_SCALE:
            factor = tl.load(k_scale + blocks + slot, mask=valid, other=0.0)
            scores *= factor[None, :]

        key_position = start + lane
        distance = key_position[None, :] - position[:, None]
        if HAS_SOFTCAP:
            scores = softcap * LOG2E * tanh(scores * (scale / softcap))
        else:
            scores *= scale * LOG2E
        if HAS_SLOPES:
            scores += slopes[:, None] * LOG2E * distance.to(tl.float32)
        visible = valid[None, :] & row_valid[:, None]
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
            seen = visible & (key_position < kv_end)[None, :]
            if BIAS == 2:
                visible = seen & (tl.load(at, mask=seen, other=0) != 0)
            else:
                addend = tl.load(at, mask=seen, other=0.0).to(tl.float32)
                # The lowest float must not become -inf, which would say that nothing is seen.
                finite = tl.maximum(addend * LOG2E, LOWEST)
                scores += tl.where(addend == float("-inf"), addend, finite)
        scores = tl.where(visible, scores, float("-inf"))

        highest, total, weights, factor = softmax_step(highest, total, scores)
        offsets = slot_offsets(ids, start, v_stride_block, v_stride_slot, BLOCK_SIZE)
        blocks = safe_ids * v_scale_stride_block
        if V_SCALE == SLOT_SCALE:
            weights *= tl.load(v_scale + blocks + slot, mask=valid, other=0.0)[None, :]
        weights = weights.to(DTYPE)
        part = load_side(
            v_cache, v_scale, offsets, blocks, valid, V_DIM, 0, V_DIM1, DTYPE, IS_E4M3, V_SCALE
        )
        values1 = values1 * factor[:, None] + product(weights, part, INTERPRETED)
        if V_DIM2 > 0:
            part = load_side(
                v_cache, v_scale, offsets, blocks, valid, V_DIM, V_DIM1, V_DIM2, DTYPE, IS_E4M3,
                V_SCALE,
            )  # fmt: skip
            values2 = values2 * factor[:, None] + product(weights, part, INTERPRETED)
    return highest, total, values1, values2


@triton.jit
def store_rows(
    values, factor, out, offsets, valid, DIM: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr
):
    """values [ROWS, PART] times factor [ROWS] to rows of `out` at `offsets`."""
    d = FIRST + tl.arange(0, PART)
    mask = valid[:, None] & (d < DIM)[None, :]
    pointers = out + offsets[:, None] + d[None, :]
    tl.store(pointers, (values * factor[:, None]).to(out.dtype.element_ty), mask=mask)
