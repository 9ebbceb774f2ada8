"""New keys and values to their slots, and the slots of new tokens.

write_kernel   grid (T, HKV): one token and head of K or V
"""

import triton
import triton.language as tl
from pykvcache.kernels.attention.tiles import CHANNEL_SCALE, HEAD_SCALE, NO_SCALE, SLOT_SCALE
from pykvcache.kernels.common.addressing import find_row
from pykvcache.kernels.common.numeric import PLAIN, encode_e4m3

LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST_SCALE = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slot_mapping"])
def write_kernel(
    x, stride_token, stride_head,  # [T, HKV, D]
    cache, stride_block, stride_cache_head, stride_slot,  # [num_blocks, HKV, block_size, D]
    scale, scale_stride_block, scale_stride_head,
    slot_mapping, num_slots,  # int64 [T]
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr,
    E4M3: tl.constexpr,
):  # fmt: skip
    """Slots outside the pool are skipped, as negative ones are: nothing may be written there."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot >= 0) & (slot < num_slots):
        d = tl.arange(0, WIDTH)
        mask = d < DIM
        values = tl.load(x + token * stride_token + head * stride_head + d, mask=mask, other=0.0)
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        target = cache + block * stride_block + head * stride_cache_head + offset * stride_slot + d
        if SCALE == NO_SCALE and E4M3 == PLAIN:
            tl.store(target, values, mask=mask)
        else:
            values = values.to(tl.float32)
            if SCALE != NO_SCALE:
                at = scale + head * scale_stride_head
                if SCALE == HEAD_SCALE:
                    divisor = tl.load(at)
                elif SCALE == SLOT_SCALE:
                    own = tl.div_rn(tl.max(tl.abs(values), 0), LARGEST)
                    own = tl.maximum(own, SMALLEST_SCALE)
                    tl.store(at + block * scale_stride_block + offset, own)
                    divisor = own
                elif SCALE == CHANNEL_SCALE:
                    divisor = tl.load(at + block * scale_stride_block + d, mask=mask, other=1.0)
                values = tl.div_rn(values, divisor)  # `/` is off by a bit on a GPU
            if E4M3 != PLAIN:
                tl.store(target, encode_e4m3(values), mask=mask)
            else:
                tl.store(target, values.to(cache.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "num_slots"],
    do_not_specialize_on_alignment=["slot_mapping"],
)
def fill_channel_scales_kernel(
    x, stride_token, stride_head, scale, scale_stride_block, scale_stride_head, slot_mapping,
    num_tokens, num_slots,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The token that covers a block's first slot sets the block's scales, from all tokens of the
    call that lie in it: TOKENS slots are looked at together. Grid (T, HKV)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if (slot >= 0) & (slot < num_slots) & (slot % BLOCK_SIZE == 0):
        d = tl.arange(0, WIDTH)
        highest = tl.zeros([WIDTH], tl.float32)
        for first in range(0, num_tokens, TOKENS):
            other = first + tl.arange(0, TOKENS)
            other_slot = tl.load(slot_mapping + other, mask=other < num_tokens, other=-1)
            same = (other_slot >= slot) & (other_slot < slot + BLOCK_SIZE)
            if tl.max(same.to(tl.int32), 0) > 0:
                at = x + head * stride_head + other.to(tl.int64)[:, None] * stride_token
                mask = same[:, None] & (d < DIM)[None, :]
                values = tl.load(at + d[None, :], mask=mask, other=0.0).to(tl.float32)
                highest = tl.maximum(highest, tl.max(tl.abs(values), 0))
        at = scale + slot // BLOCK_SIZE * scale_stride_block + head * scale_stride_head + d
        own = tl.maximum(tl.div_rn(highest, LARGEST), SMALLEST_SCALE)
        tl.store(at, own, mask=d < DIM)


@triton.jit(
    do_not_specialize=["rows", "stride_table", "max_blocks", "num_tokens"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "cu_seqlens_q", "slots"],
)
def slot_mapping_kernel(
    block_table, stride_table, max_blocks, seq_lens, cu_seqlens_q, slots, rows, num_tokens,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """slots int64 [num_tokens]; -1 for padding, holes and tokens after the last row."""
    token = tl.program_id(0)
    row = find_row(cu_seqlens_q, rows, token)
    slot = tl.full([], -1, tl.int64)
    if row < rows:
        end = tl.load(cu_seqlens_q + row + 1)
        position = tl.load(seq_lens + row) - (end - token)
        if (position >= 0) & (position // BLOCK_SIZE < max_blocks):
            at = block_table + row.to(tl.int64) * stride_table + position // BLOCK_SIZE
            id = tl.load(at).to(tl.int64)
            slot = tl.where(id >= 0, id * BLOCK_SIZE + position % BLOCK_SIZE, slot)
    tl.store(slots + token, slot)
