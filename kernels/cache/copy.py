"""Copies of whole blocks, and blocks to dense rows.

copy_kernel     grid (pairs times pieces of a block)
gather_kernel   grid (tokens, HKV)
"""

import triton
import triton.language as tl
from pykvcache.kernels.common.addressing import find_row


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["pairs"])
def copy_kernel(src, src_stride, dst, dst_stride, pairs, elements, pieces, WIDTH: tl.constexpr):
    """dst[pairs[n, 1]] = src[pairs[n, 0]]; blocks are `elements` contiguous elements.

    `elements` is specialised, being the same in every call: unless the compiler knows that it is a
    multiple of 16, the mask costs the wide loads.
    """
    pair = tl.program_id(0).to(tl.int64) // pieces
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    i = (tl.program_id(0) % pieces).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = i < elements
    values = tl.load(src + source * src_stride + i, mask=mask)
    tl.store(dst + target * dst_stride + i, values, mask=mask)


@triton.jit(
    do_not_specialize=["rows", "stride_table", "total"],
    do_not_specialize_on_alignment=["block_table", "cu_seqlens_k"],
)
def gather_kernel(
    cache, stride_block, stride_head, stride_slot, block_table, stride_table, cu_seqlens_k,
    dense, rows, total,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """dense [total, HKV, D]; holes, and tokens after the last row, are 0."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = find_row(cu_seqlens_k, rows, token)
    d = tl.arange(0, WIDTH)
    mask = d < DIM
    values = tl.zeros([WIDTH], cache.dtype.element_ty)
    if row < rows:
        position = token - tl.load(cu_seqlens_k + row)
        id = tl.load(block_table + row.to(tl.int64) * stride_table + position // BLOCK_SIZE)
        at = (
            cache
            + tl.maximum(id, 0).to(tl.int64) * stride_block
            + head.to(tl.int64) * stride_head
            + (position % BLOCK_SIZE).to(tl.int64) * stride_slot
        )
        present = mask & (id + tl.zeros([WIDTH], tl.int32) >= 0)
        values = tl.load(at + d, mask=present, other=0)
    place = token.to(tl.int64) * tl.num_programs(1) + head
    tl.store(dense + place * DIM + d, values, mask=mask)
