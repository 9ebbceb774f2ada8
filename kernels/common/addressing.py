"""From positions of a sequence to addresses in the block pool: the one place that reads a table.

Tiles begin at multiples of TILE, so a tile lies in one block, or holds whole blocks, whenever both
sizes are powers of two: then one id is read a block and not one a token.
"""

import triton
import triton.language as tl


@triton.jit
def load_blocks(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks that hold positions [start, start + TILE), int32; -1 in holes, from end on.

    table: block_table of one row. Entries of blocks that begin at or past `end` are not read.
    Returns one id if the tile lies in one block, one a block if it holds whole blocks, else one a
    token.
    """
    if BLOCK_SIZE % TILE == 0:
        index = start // BLOCK_SIZE + tl.arange(0, 1)
        there = start + tl.arange(0, 1) < end
    elif TILE % BLOCK_SIZE == 0:
        index = start // BLOCK_SIZE + tl.arange(0, TILE // BLOCK_SIZE)
        there = index * BLOCK_SIZE < end
    else:
        position = start + tl.arange(0, TILE)
        index = position // BLOCK_SIZE
        there = position < end
    return tl.load(table + index, mask=there, other=-1)


@triton.jit
def spread_ids(blocks, start, end, TILE: tl.constexpr):
    """Block id of each token of a tile, int32 [TILE], from load_blocks; -1 from `end` on."""
    EACH: tl.constexpr = TILE // blocks.shape[0]
    ids = tl.reshape(tl.broadcast_to(blocks[:, None], [blocks.shape[0], EACH]), [TILE])
    return tl.where(start + tl.arange(0, TILE) < end, ids, -1)


@triton.jit
def slot_offsets(ids, start, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr):
    """Offsets, in elements for head 0, of the tokens from `start` on; not to be used where ids are
    negative.

    Ids are widened before they are multiplied: a pool may hold more than 2^31 elements.
    """
    slot = (start + tl.arange(0, ids.shape[0])) % BLOCK_SIZE
    return ids.to(tl.int64) * stride_block + slot.to(tl.int64) * stride_slot


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
