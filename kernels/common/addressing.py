"""From positions of a sequence to addresses in the block pool: the one place that reads a table.

Tiles begin at multiples of TILE, so a tile lies in one block, or holds whole blocks, whenever both
sizes are powers of two: then one id is read a block and not one a token.
"""

import triton
import triton.language as tl


@triton.jit
def load_block_ids(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of positions [start, start + TILE), int32 [TILE]; -1 for holes and from `end` on.

    table: block_table of one row. Entries of blocks that begin at or past `end` are not read.
    """
    position = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        id = tl.load(table + start // BLOCK_SIZE, mask=start < end, other=-1)
        ids = tl.full([TILE], 0, tl.int32) + id
    elif TILE % BLOCK_SIZE == 0:
        BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
        index = start // BLOCK_SIZE + tl.arange(0, BLOCKS)
        ids = tl.load(table + index, mask=index * BLOCK_SIZE < end, other=-1)
        ids = tl.reshape(tl.broadcast_to(ids[:, None], [BLOCKS, BLOCK_SIZE]), [TILE])
    else:
        ids = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=-1)
    return tl.where(position < end, ids, -1)


@triton.jit
def slot_offsets(ids, start, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr):
    """Offsets, in elements for head 0, of the tokens from `start` on; 0 where ids are negative.

    Ids are widened before they are multiplied: a pool may hold more than 2^31 elements.
    """
    slot = (start + tl.arange(0, ids.shape[0])) % BLOCK_SIZE
    block = tl.maximum(ids, 0).to(tl.int64)
    return block * stride_block + slot.to(tl.int64) * stride_slot


@triton.jit
def find_row(starts, rows, index):
    """The row b with starts[b] <= index < starts[b + 1]; starts int32 [rows + 1] does not fall."""
    WIDTH: tl.constexpr = 128
    row = 0
    for first in range(0, rows, WIDTH):
        number = first + tl.arange(0, WIDTH)
        ends = tl.load(starts + 1 + number, mask=number < rows, other=2147483647)
        row += tl.sum((ends <= index).to(tl.int32), 0)
    return row
