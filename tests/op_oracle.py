"""Attention written a second time, densely and independently of the package, at a chosen precision.

At float64 it is the truth; at the dtype of a case it is what a careful user would write, and its
error sets the tolerance: a backend may be twice as far from the truth, no more.
"""

from __future__ import annotations

import torch
from op_cases import Case, Data
from torch import Tensor


def dense_attention(case: Case, data: Data, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out [T, HQ, Dv] and lse [T, HQ], every operation done in `dtype`."""
    q, kwargs = data.args[0], data.kwargs
    group = case.num_heads // case.num_kv_heads
    outs, lses, start = [], [], 0
    for row, (q_len, kv_len) in enumerate(case.rows):
        queries = q[start : start + q_len].to(dtype).transpose(0, 1)
        start += q_len
        keys = data.keys[row].to(dtype).permute(1, 2, 0).repeat_interleave(group, 0)
        values = data.values[row].to(dtype).transpose(0, 1).repeat_interleave(group, 0)
        scores = queries @ keys * kwargs["scale"]
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        distance = torch.arange(kv_len) - (torch.arange(q_len) + kv_len - q_len)[:, None]
        if case.alibi:
            scores = scores + (kwargs["alibi_slopes"][:, None, None] * distance).to(dtype)
        allowed = _allowed(case, q_len, kv_len) & data.present[row]
        if case.bias:
            bias = kwargs["bias"].expand(len(case.rows), case.num_heads, -1, -1)
            bias = bias[row, :, :q_len, :kv_len]
            if bias.dtype == torch.bool:
                allowed = allowed & bias
            else:
                scores = scores + bias.to(dtype)
        scores = scores.masked_fill(~allowed, -torch.inf)
        if case.sinks:
            sink = kwargs["sinks"].to(dtype)[:, None, None].expand(-1, q_len, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., :kv_len]
        outs.append((weights @ values).transpose(0, 1))
        lses.append(torch.logsumexp(scores.double(), -1).T)
    return torch.cat(outs), torch.cat(lses)


def _allowed(case: Case, q_len: int, kv_len: int) -> Tensor:
    """Bool [q_len, kv_len], spelled out pair by pair."""
    allowed = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        position = kv_len - q_len + i
        for j in range(kv_len):
            after = case.causal and j > position
            left = case.window and j <= position - case.window
            other_chunk = case.chunk and j < position // case.chunk * case.chunk
            allowed[i, j] = position >= 0 and not (after or left or other_chunk)
    return allowed


def assert_as_good_as_dense(case: Case, data: Data, out: Tensor, lse: Tensor) -> None:
    """The error of `out` against float64 is at most twice a same-dtype dense computation's.

    One rounding of the output dtype is allowed on top: max error x 2 and mean error x 1.5.
    """
    truth, true_lse = dense_attention(case, data, torch.float64)
    naive, _ = dense_attention(case, data, case.dtype)
    assert out.dtype == case.dtype and out.shape == truth.shape
    assert lse.dtype == torch.float32 and lse.shape == true_lse.shape
    error, naive_error = (out.double() - truth).abs(), (naive.double() - truth).abs()
    assert torch.isfinite(out).all(), f"not finite at {_worst(~torch.isfinite(out))}"
    if truth.numel():
        quantum = torch.finfo(case.dtype).eps * max(truth.abs().max().item(), 1e-3)
        worst = f"max error {error.max():.3g} at {_worst(error)}, dense {naive_error.max():.3g}"
        assert error.max() <= 2 * naive_error.max() + quantum, worst
        assert error.mean() <= 1.5 * naive_error.mean() + quantum, worst
    masked = true_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, masked), "lse is -inf in other places"
    assert (out[masked] == 0).all(), "a query that attends to nothing must give zeros"
    # scores of 16-bit inputs are exact products, so only their float32 sums differ
    torch.testing.assert_close(
        lse[~masked].double(), true_lse[~masked], atol=2e-4 * case.spread**2, rtol=2e-5
    )


def _worst(error: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(error.float().argmax(), error.shape)]
