"""The contract: the public functions that every backend implements.

The functions here choose the backend and hand it caches in the one layout that backends know:
[num_blocks, HKV, block_size, D] with any strides, last dim contiguous.

Read first: pykvcache/reference.py, pykvcache/operators.py. Read next: pykvcache/allocator.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykvcache.operators import OpTable, backends, table

__all__ = [
    "backends",
    "copy_blocks",
    "gather_kv",
    "merge_states",
    "paged_attention",
    "plan",
    "slot_mapping",
    "table",
    "write_kv",
]

LAYOUTS = ("HND", "NHD")


def _table(backend: str, x: Tensor) -> OpTable:
    """The operators for x's device; the name of a device takes longer than the question."""
    return table(backend, "cpu" if x.is_cpu else x.device.type)


def _hnd(cache: Tensor | None, layout: str) -> Tensor | None:
    """The cache as [num_blocks, HKV, block_size, D], without a copy."""
    if layout == "HND" or cache is None:
        return cache
    if layout != "NHD":
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return cache.transpose(1, 2)


def _float32(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.float()


class _NoBackward(torch.autograd.Function):
    """Identity on the result of paged attention whose backward is an error."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "attention over a paged cache has no gradient: "
            "run without a cache, or with DynamicCache"
        )


def refuse_gradient(q: Tensor, out: Tensor) -> Tensor:
    """`out`, tied to q so that a backward pass is an error instead of a gradient left out."""
    tied: Tensor = _NoBackward.apply(q, out)  # type: ignore[no-untyped-call]
    return tied


def _detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


def write_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    layout: str = "HND",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Scatter new keys and values into their slots, in place.

    Args:
        k, v: [T, HKV, D] and [T, HKV, Dv], float32, float16 or bfloat16; v is None when v_cache is.
        k_cache, v_cache: [num_blocks, HKV, block_size, D | Dv] ("HND") or
            [num_blocks, block_size, HKV, D | Dv] ("NHD"), dtype of k, or float8_e4m3fn.
        slot_mapping: int64 [T], block_id * block_size + offset; -1 skips the token.
        k_scale, v_scale: float32 [], [HKV], [num_blocks, HKV, block_size] or [num_blocks, HKV, D];
            stored = value / scale. The two per-block kinds need a float8_e4m3fn cache and are
            filled
            here: one scale a slot, or one a channel set by the call that writes a block's first
                slot.
        backend: "auto" or a name from `backends()`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; nothing was
            written.
    """
    _table(backend, k_cache).write_kv(
        _detached(k),
        _detached(v),
        _hnd(k_cache, layout),
        _hnd(v_cache, layout),
        slot_mapping,
        k_scale,
        v_scale,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_head_dim: int | None = None,
    layout: str = "HND",
    plan: Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries over the blocks of their sequences.

    Decode, prefill, chunked prefill and any mix of them are one call: row b's queries are
    q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]] and query i of q_len stands at position
    seq_lens[b] - q_len + i. A query at a negative position is padding and attends to nothing.

    Args:
        q: [T, HQ, D], float32, float16 or bfloat16; HQ a multiple of HKV, D up to 576.
        k_cache, v_cache: as in `write_kv`; v_cache=None takes V from the first v_head_dim of K.
        block_table: int32 [B, max_blocks]; -1 below seq_len is a hole: masked, positions keep
            counting.
        seq_lens: int32 [B], KV length including this step's tokens; 0 is legal.
        cu_seqlens_q: int32 [B + 1], running sum of the rows' query counts, from 0 to T.
        max_seqlen_q: at least the longest row's query count.
        scale: factor of q k^T; default D ** -0.5.
        causal: query at position p sees keys at positions <= p.
        window: sees the last `window` positions, its own included; 0 = all.
        chunk: sees its own chunk only, positions >= p // chunk * chunk; 0 = all.
        softcap: scores become softcap * tanh(scores / softcap); 0 = off.
        sinks: [HQ] logits that take part in the softmax but add no value (gpt-oss).
        alibi_slopes: [HQ]; adds slope * (key position - query position), after softcap.
        bias: float (added last) or bool (True = may attend), broadcastable to [B, HQ, max_q,
            max_kv].
        k_scale, v_scale: factors of the stored values, shapes as in `write_kv`. With one v_scale a
            slot, GPUs keep all digits of values whose scales are up to 2**28 apart in a sequence.
        v_head_dim: Dv of the output; default v_cache's last dim.
        layout: "HND" or "NHD", of both caches.
        plan: what `plan` returned for these lengths, reused by all layers of a step.
        deterministic: a row's bits do not depend on the other rows, max_seqlen_q or the thread
            count.
        backend: "auto" or a name from `backends()`.

    Returns:
        out [T, HQ, Dv] in q's dtype and lse float32 [T, HQ] (natural log, sink included). A query
        that attends to nothing has out = 0 and lse = -inf, or the logit of its sink.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, dtype or range.
        RuntimeError: in a backward pass through the result; there is no gradient.
    """
    if v_head_dim is None:
        if v_cache is None:
            raise ValueError("v_head_dim must be given when v_cache is None")
        v_head_dim = v_cache.shape[-1]
    out, lse = _table(backend, q).paged_attention(
        _detached(q),
        _hnd(k_cache, layout),
        _hnd(v_cache, layout),
        block_table,
        seq_lens,
        cu_seqlens_q,
        max_seqlen_q,
        max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
        causal,
        window,
        chunk,
        softcap,
        _float32(sinks),
        _float32(alibi_slopes),
        bias,
        k_scale,
        v_scale,
        v_head_dim,
        plan,
        deterministic,
    )
    return (refuse_gradient(q, out) if q.requires_grad else out), lse


def merge_states(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    Args:
        outs: [S, T, HQ, D], each normalised over its own keys.
        lses: float32 [S, T, HQ], natural log; -inf marks a partial that saw no key.

    Returns:
        out [T, HQ, D] and lse float32 [T, HQ]. Give a sink to one partial only.
    """
    return _table(backend, outs).merge_states(outs, lses)


def copy_blocks(
    src: list[Tensor], dst: list[Tensor], pairs: Tensor, *, backend: str = "auto"
) -> None:
    """Copy whole blocks, for copy-on-write or swapping: dst[i][pairs[n, 1]] = src[i][pairs[n, 0]].

    Args:
        src, dst: lists of caches, blocks in the first dim; src[i] and dst[i] may be one tensor, or
            tensors on two devices.
        pairs: int64 [N, 2]; no destination is also a source.

    Raises:
        ValueError, TypeError: lists of different length, blocks of different shape, a block id out
            of range; nothing was copied.
    """
    if not src and not dst:
        return
    same_device = all(s.device == d.device for s, d in zip(src, dst, strict=False))
    if backend == "auto" and not same_device:
        backend = "reference"
    table(backend, dst[0].device.type if dst else "cpu").copy_blocks(src, dst, pairs)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_k: Tensor,
    total_k: int,
    *,
    layout: str = "HND",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Blocks to dense rows, end to end: k [total_k, HKV, D] and v [total_k, HKV, Dv].

    Args:
        k_cache, v_cache, block_table, seq_lens, layout, backend: as in `paged_attention`.
        cu_seqlens_k: int32 [B + 1], running sum of seq_lens.
        total_k: cu_seqlens_k[-1], known to the host.

    Both have the cache's dtype; holes are zero. Without v_cache, v is [total_k, HKV, 0].
    """
    return _table(backend, k_cache).gather_kv(
        _hnd(k_cache, layout), _hnd(v_cache, layout), block_table, seq_lens, cu_seqlens_k, total_k
    )


def slot_mapping(
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    num_tokens: int,
    block_size: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Slots of the newest tokens of every row, computed on the device: int64 [num_tokens].

    Token i of row b is the one at position seq_lens[b] - q_len[b] + i; negative positions, holes
    and tokens after the last row get -1.
    """
    return _table(backend, block_table).slot_mapping(
        block_table, seq_lens, cu_seqlens_q, num_tokens, block_size
    )


def plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window: int = 0,
    chunk: int = 0,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Work partition of `paged_attention` for these lengths: opaque int32, sized by B and device.

    Compute it once per layer group and step and pass it to every layer. The CPU and the reference
    divide their work inside the operator, so there it is empty.

    A plan is for one backend and for calls with these lengths, `max_seqlen_q` included, heads,
    window, chunk and `deterministic`: what a call does with another one is undefined, since it
    cannot look at the plan without waiting for the GPU.
    """
    return _table(backend, seq_lens).plan(
        seq_lens, cu_seqlens_q, max_seqlen_q, num_heads, num_kv_heads, head_dim, window, chunk,
        deterministic,
    )  # fmt: skip
