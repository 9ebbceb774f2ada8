"""Online softmax over tiles of keys (Milakov and Gimelshein, 2018), in base 2.

A state is (maximum, total, weighted values) of the keys seen so far, per query row. Scores come in
units of log2, so that exp2 serves; a row that has seen nothing has maximum -inf and total 0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(highest, total, scores):
    """Take a tile of scores [M, N] into (highest, total) [M].

    Returns highest, total, the weights of the tile [M, N], and the factor [M] that turns what was
    weighted before into the new unit.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # never -inf minus -inf
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(highest - base)
    return new_highest, total * factor + tl.sum(weights, 1), weights, factor


@triton.jit
def softmax_finish(highest, total):
    """(factor of the weighted values, natural lse) [M]; 0 and -inf where nothing was seen."""
    empty = total == 0.0
    factor = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    lse = (highest + tl.log2(tl.where(empty, 1.0, total))) * LN2
    return factor, tl.where(empty, float("-inf"), lse)


@triton.jit
def softmax_add_sink(highest, total, sink):
    """A sink logit [M], in log2, joins the sum and adds no value; returns a factor too."""
    new_highest = tl.maximum(highest, sink)
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    factor = tl.exp2(highest - base)
    return new_highest, total * factor + tl.exp2(sink - base), factor
