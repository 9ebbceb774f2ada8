"""Which part of the work each decode program does: computed on the device, once per step.

The KV tiles of all rows are laid end to end and cut evenly over the programs (stream-K; Osama et
al., 2023), so one long row among short ones is shared by many programs. The plan is only the
running sum of units a row:

    units    0      3 4            9         12      rows 0 to 3 have 3, 1, 5 and 3 tiles
    rows     |--0---|1|-----2------|----3----|
    programs |----0----|----1----|-----2-----|       3 programs do 4 tiles each

Row 2 is cut: programs 1 and 2 leave partial results, which merge.py combines. A unit is one tile;
with deterministic=True it is FIXED_TILES tiles at fixed positions, so that cuts depend on nothing
but the row.
"""

import triton
import triton.language as tl

WIDTH = tl.constexpr(256)  # rows at once


@triton.jit
def row_tiles(
    seq_len, q_len, window, chunk, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
):  # fmt: skip
    """First tile that the first of q_len queries can see, and the end of the row's tiles."""
    first = tl.maximum(seq_len - q_len, 0)
    begin = first * 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0)
    if HAS_CHUNK:
        begin = tl.maximum(begin, first // chunk * chunk)
    return begin // TILE, (seq_len + TILE - 1) // TILE


@triton.jit
def sharing_programs(programs, units):
    """Programs that have a share: no more than units, so that no slot of a cut row stays empty."""
    return tl.maximum(tl.minimum(programs, units), 1)


@triton.jit(
    do_not_specialize=["rows", "most_rows", "window", "chunk"],
    do_not_specialize_on_alignment=["seq_lens", "cu_seqlens_q", "plan"],
)
def plan_kernel(
    seq_lens, cu_seqlens_q, plan, rows, most_rows, window, chunk,
    GROUP: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
):  # fmt: skip
    """plan int32 [rows + 1]: units of the rows before each row; UNIT tiles each.

    Rows of more than most_rows query rows are not decode's and have none; every other row that has
    a query has at least one, so that somebody writes its result.
    """
    tl.store(plan, 0)
    before = 0
    for first in range(0, rows, WIDTH):
        row = first + tl.arange(0, WIDTH)
        mask = row < rows
        seq_len = tl.load(seq_lens + row, mask=mask, other=0)
        q_len = tl.load(cu_seqlens_q + row + 1, mask=mask, other=0) - tl.load(
            cu_seqlens_q + row, mask=mask, other=0
        )
        begin, end = row_tiles(seq_len, q_len, window, chunk, TILE, HAS_WINDOW, HAS_CHUNK)
        units = tl.maximum((end + UNIT - 1) // UNIT - begin // UNIT, 1)
        units = tl.where((q_len > 0) & (q_len * GROUP <= most_rows), units, 0)
        tl.store(plan + row + 1, before + tl.cumsum(units, 0), mask=mask)
        before += tl.sum(units, 0)
