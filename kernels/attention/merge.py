"""Combine what several decode programs saw of one row: softmax states and values of its pieces.

    grid (B, GROUPS * query rows of a group): programs of rows that nobody cut return at once.

Also `merge_states`, the same of partials that a caller kept: out = sum_s out_s exp(lse_s - lse).
Pieces have no lse: beside a bias of -1e9 it has no room for a sum.
"""

import triton
import triton.language as tl
from pykvcache.kernels.attention.plan import sharing_programs
from pykvcache.kernels.common.softmax import LN2, LOG2E


@triton.jit
def piece_range(plan, row, rows, programs, FIXED: tl.constexpr):
    """Workspace slots [begin, end) of a row; at most one if nobody cut it. See decode.py."""
    begin, end = tl.load(plan + row), tl.load(plan + row + 1)
    if FIXED:
        return begin, end
    units = tl.load(plan + rows)
    programs = sharing_programs(programs, units)
    units = tl.maximum(units, 1).to(tl.int64)
    # The program of unit u is the last one whose share begins at or before u.
    first = ((begin.to(tl.int64) + 1) * programs - 1) // units
    last = (end.to(tl.int64) * programs - 1) // units
    return (first + row).to(tl.int32), tl.where(end > begin, last + row + 1, first + row).to(
        tl.int32
    )


@triton.jit(
    do_not_specialize=["rows", "programs", "part_rows"],
    do_not_specialize_on_alignment=["cu_seqlens_q", "plan", "sinks"],
)
def merge_kernel(
    part_values, part_states,  # float32 [slots, GROUPS, part_rows, DV], [..., part_rows, 2]
    cu_seqlens_q, plan, sinks, out, lse, rows, programs, part_rows,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, V_DIM: tl.constexpr,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One query row of one sequence, all of its slots, PIECES at once: one after the other they
    would wait for memory as often as there are pieces."""
    row, r = tl.program_id(0), tl.program_id(1) // GROUPS
    group = tl.program_id(1) % GROUPS
    token = tl.load(cu_seqlens_q + row)
    q_len = tl.load(cu_seqlens_q + row + 1) - token
    begin, end = piece_range(plan, row, rows, programs, FIXED)
    if (r < q_len * GROUP) & (end - begin > 1):
        head = group * GROUP + r % GROUP
        d = tl.arange(0, WIDTH)
        highest, total = float("-inf"), 0.0
        values = tl.zeros([WIDTH], tl.float32)
        if sinks is not None:
            highest = tl.load(sinks + head) * LOG2E
            total = tl.where(highest == float("-inf"), 0.0, 1.0)
        for first in range(begin, end, PIECES):
            slot = first + tl.arange(0, PIECES)
            place = (slot.to(tl.int64) * GROUPS + group) * part_rows + r
            there = slot < end
            part_highest = tl.load(part_states + 2 * place, mask=there, other=float("-inf"))
            part_totals = tl.load(part_states + 2 * place + 1, mask=there, other=0.0)  # [PIECES]
            parts = tl.load(
                part_values + place[:, None] * V_DIM + d[None, :],
                mask=there[:, None] & (d < V_DIM)[None, :],
                other=0.0,
            )
            new_highest = tl.maximum(highest, tl.max(part_highest, 0))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # never -inf minus -inf
            weights, factor = tl.exp2(part_highest - base), tl.exp2(highest - base)
            total = total * factor + tl.sum(weights * part_totals, 0)
            values = values * factor + tl.sum(
                tl.where(weights[:, None] != 0.0, weights[:, None] * parts, 0.0), 0
            )
            highest = new_highest
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        place = (token + r // GROUP).to(tl.int64) * (GROUPS * GROUP) + head
        row_lse = (highest + tl.log2(divisor)) * LN2
        tl.store(lse + place, tl.where(empty, float("-inf"), row_lse))
        tl.store(
            out + place * V_DIM + d, (values / divisor).to(out.dtype.element_ty), mask=d < V_DIM
        )


@triton.jit(do_not_specialize=["parts", "places"])
def merge_states_kernel(
    outs, lses, out, lse, parts, places, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """outs [S, places, D] and lses [S, places] into out [places, D] and lse [places]."""
    place = tl.program_id(0).to(tl.int64)
    stride = tl.zeros([], tl.int64) + places
    d = tl.arange(0, WIDTH)
    mask = d < DIM
    highest = float("-inf")
    for s in range(0, parts):
        highest = tl.maximum(highest, tl.load(lses + s * stride + place))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    for s in range(0, parts):
        total += tl.exp(tl.load(lses + s * stride + place) - base)
    factor = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    values = tl.zeros([WIDTH], tl.float32)
    for s in range(0, parts):
        at = s * stride + place
        weight = tl.exp(tl.load(lses + at) - base) * factor
        part = tl.load(outs + at * DIM + d, mask=mask, other=0.0).to(tl.float32)
        values += tl.where(weight != 0.0, weight * part, 0.0)
    tl.store(out + place * DIM + d, values.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + place, tl.where(total == 0.0, float("-inf"), base + tl.log(
        tl.where(total == 0.0, 1.0, total)
    )))  # fmt: skip
