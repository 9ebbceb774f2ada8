"""Attention written a second time, densely and independently of the package, at a chosen precision.

At float64 it is the truth; at the dtype of a case it is what a careful user would write, and its
error sets the tolerance: a backend may be twice as far from the truth, no more.
"""

from __future__ import annotations

import functools

import torch
from op_cases import Case, Data
from torch import Tensor


@functools.lru_cache(maxsize=8)
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

    def allowed(position: int, key: int) -> bool:
        after = case.causal and key > position
        left = case.window and key <= position - case.window
        other_chunk = case.chunk and key < position // case.chunk * case.chunk
        return position >= 0 and not (after or left or other_chunk)

    rows = [[allowed(kv_len - q_len + i, j) for j in range(kv_len)] for i in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).reshape(q_len, kv_len)


def assert_as_good_as_dense(case: Case, data: Data, out: Tensor, lse: Tensor) -> None:
    """The error of `out` against float64 is at most twice a same-dtype dense computation's.

    One rounding of the output dtype is allowed on top: max error x 2 and mean error x 1.5.
    """
    truth, true_lse = dense_attention(case, data, torch.float64)
    naive, naive_lse = dense_attention(case, data, case.dtype)
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
    if not masked.all():
        lse_error = (lse.double() - true_lse)[~masked].abs().max()
        naive_error = (naive_lse - true_lse)[~masked].abs().max()
        assert lse_error <= naive_error + 1e-5, (
            f"lse error {lse_error:.3g}, dense {naive_error:.3g}"
        )


def _worst(error: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(error.float().argmax(), error.shape)]
