"""START HERE: every operator of pykvcache in plain PyTorch, slow and obvious.

These functions define what the operators mean; each backend is tested against them. One row
(sequence) is handled at a time, in float32, with nothing fused. Names and shapes are those of the
whole project:

    B, T        sequences, packed query tokens          HQ, HKV, G   query heads, KV heads, HQ //
    HKV D, Dv       head dim of q and k, of v               slot         block_id * block_size +
    offset k_cache     [num_blocks, HKV, block_size, D]        block_table  int32 [B, max_blocks],
    -1 = hole or unused

Read next: pykvcache/operators.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pykvcache.checks import (
    check_attention,
    check_cache,
    check_copy,
    check_key_starts,
    check_merge,
    check_slot_mapping,
    check_write,
    scale_kind,
)

FP8_MAX = 448.0  # largest finite value of float8_e4m3fn
SMALLEST_SCALE = 1e-12


def write_kv(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Scatter new keys and values into their slots.

    Args:
        k, v: [T, HKV, D], [T, HKV, Dv]; v is None when v_cache is.
        k_cache, v_cache: [num_blocks, HKV, block_size, D | Dv], written in place.
        slot_mapping: int64 [T]; -1 skips the token.
        k_scale, v_scale: see `ops.write_kv`; per-block scales are filled here.
    """
    check_write(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    _write_side(k[kept], k_cache, slots, k_scale)
    if v is not None and v_cache is not None:
        _write_side(v[kept], v_cache, slots, v_scale)


def _write_side(x: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """Write x [N, HKV, D] at `slots`, quantised with `scale` when there is one."""
    block_size = cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    if scale is not None:
        _fill_scale(x, scale, block, offset, block_size)
        x = x.float() / _scale_at(scale, cache, block, offset)
    if cache.dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-FP8_MAX, FP8_MAX)
    heads = torch.arange(cache.shape[1], device=cache.device)
    cache[block[:, None], heads, offset[:, None]] = x.to(cache.dtype)


def _fill_scale(x: Tensor, scale: Tensor, block: Tensor, offset: Tensor, block_size: int) -> None:
    """Set per-block scales from x [N, HKV, D] so that the largest value maps to FP8_MAX.

    A per-slot scale belongs to one token and is always set. A per-channel scale belongs to a block:
    the call that writes the block's first slot sets it from all its tokens there, later tokens
    saturate.
    """
    kind = scale_kind(scale, block_size, x.shape[2])
    heads = torch.arange(x.shape[1], device=x.device)
    if kind == "slot":
        amax = x.float().abs().amax(-1)
        scale[block[:, None], heads, offset[:, None]] = (amax / FP8_MAX).clamp(min=SMALLEST_SCALE)
    elif kind == "channel":
        for first in block[offset == 0].unique():
            amax = x[block == first].float().abs().amax(0)
            scale[first] = (amax / FP8_MAX).clamp(min=SMALLEST_SCALE)


def _scale_at(scale: Tensor, cache: Tensor, block: Tensor, offset: Tensor) -> Tensor:
    """The factor of each stored value at (block, offset) [N]: broadcastable to [N, HKV, D]."""
    kind = scale_kind(scale, cache.shape[2], cache.shape[3])
    if kind == "scalar":
        return scale
    if kind == "head":
        return scale[:, None]
    if kind == "slot":
        return scale[block, :, offset][..., None]
    return scale[block]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    causal: bool,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    v_head_dim: int,
    plan: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries over the blocks of their rows; see `ops.paged_attention`.

    Returns:
        out [T, HQ, Dv] in the dtype of q and lse float32 [T, HQ] (natural log, sink included).
    """
    check_attention(
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, max_seqlen_q, scale, window,
        chunk, softcap, sinks, alibi_slopes, bias, k_scale, v_scale, v_head_dim,
    )  # fmt: skip
    num_tokens, num_heads, _ = q.shape
    group = num_heads // k_cache.shape[1]
    out = q.new_zeros(num_tokens, num_heads, v_head_dim)
    lse = torch.full((num_tokens, num_heads), -torch.inf, device=q.device)
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        keys, present = _gather_row(k_cache, k_scale, block_table[row], length)
        if v_cache is None:
            values = keys[..., :v_head_dim]
        else:
            values, _ = _gather_row(v_cache, v_scale, block_table[row], length)
        keys = keys.repeat_interleave(group, 1)  # [S, HQ, D]
        values = values.repeat_interleave(group, 1)  # [S, HQ, Dv]

        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        q_pos = torch.arange(length - (end - start), length, device=q.device)[:, None]
        k_pos = torch.arange(length, device=q.device)[None, :]
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[:, None, None] * (k_pos - q_pos)
        visible = _visible(q_pos, k_pos, causal, window, chunk) & present
        if bias is not None:
            row_bias = bias.expand(len(seq_lens), num_heads, *bias.shape[2:])[row]
            row_bias = _slice_bias(row_bias, end - start, length)
            if bias.dtype == torch.bool:
                visible = visible & row_bias
            else:
                scores = scores + row_bias.float()
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, end - start, 1)
            scores = torch.cat([scores, sink], dim=-1)
        row_lse = torch.logsumexp(scores, dim=-1)  # [HQ, q]
        nothing = (row_lse == -torch.inf)[..., None]
        weights = scores.softmax(dim=-1).masked_fill(nothing, 0.0)[..., :length]
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        lse[start:end] = row_lse.T
    return out, lse


def _gather_row(
    cache: Tensor, scale: Tensor | None, blocks: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """One row as float32 [length, HKV, D], 0 in holes, and which positions are present [length]."""
    block_size = cache.shape[2]
    position = torch.arange(length, device=cache.device)
    block = blocks[position // block_size].long()
    present = block >= 0
    block, offset = block.clamp(min=0), position % block_size
    x = cache[block, :, offset].float()
    if scale is not None:
        x = x * _scale_at(scale, cache, block, offset)
    return x.masked_fill(~present[:, None, None], 0.0), present


def _visible(q_pos: Tensor, k_pos: Tensor, causal: bool, window: int, chunk: int) -> Tensor:
    """Bool [q, k]: the keys each query may see; one before position 0 is padding and sees none."""
    visible = (q_pos >= 0) & (k_pos >= 0)
    if causal:
        visible = visible & (k_pos <= q_pos)
    if window > 0:
        visible = visible & (k_pos > q_pos - window)
    if chunk > 0:
        visible = visible & (k_pos >= q_pos // chunk * chunk)
    return visible


def _slice_bias(bias: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The first q_len queries and kv_len keys of bias [HQ, 1 | max_q, 1 | max_kv]."""
    queries = bias if bias.shape[1] == 1 else bias[:, :q_len]
    return queries if bias.shape[2] == 1 else queries[:, :, :kv_len]


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys.

    Each partial is a softmax normalised over its own keys; weighting by exp(lse) renormalises them,
    as in FlashAttention (Dao et al., 2022, section 3.1).

    Args:
        outs: [S, T, HQ, D]; a partial whose lse is -inf is ignored, whatever its out holds.
        lses: float32 [S, T, HQ], natural log.

    Returns:
        out [T, HQ, D] in the dtype of outs and lse float32 [T, HQ].
    """
    check_merge(outs, lses)
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))[..., None]
    parts = torch.where(weights != 0, outs.float() * weights, 0.0)
    return parts.sum(0).to(outs.dtype), lse


def copy_blocks(src: list[Tensor], dst: list[Tensor], pairs: Tensor) -> None:
    """Copy whole blocks: dst[i][pairs[n, 1]] = src[i][pairs[n, 0]] for every cache i and pair n.

    Args:
        src, dst: equally many caches, any layout with blocks first; src[i] and dst[i] may be one
            tensor or live on different devices.
        pairs: int64 [N, 2]; no destination may also be a source.
    """
    check_copy(src, dst, pairs)
    for source, target in zip(src, dst, strict=True):
        blocks = source[pairs[:, 0].to(source.device)]
        target[pairs[:, 1].to(target.device)] = blocks.to(target.device)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_k: Tensor,
    total_k: int,
) -> tuple[Tensor, Tensor]:
    """Blocks to dense rows, end to end: k [total_k, HKV, D], v [total_k, HKV, Dv]; holes are 0.

    cu_seqlens_k int32 [B + 1] holds the running sum of seq_lens. Without v_cache, v has last dim 0.
    """
    check_cache(k_cache, v_cache, block_table, seq_lens)
    check_key_starts(seq_lens, cu_seqlens_k, total_k)
    sides = []
    for cache in (k_cache, v_cache):
        if cache is None:
            sides.append(k_cache.new_zeros(total_k, k_cache.shape[1], 0))
            continue
        dense = cache.new_zeros(total_k, cache.shape[1], cache.shape[3])
        starts = cu_seqlens_k.tolist()
        for row, length in enumerate(seq_lens.tolist()):
            position = torch.arange(length, device=cache.device)
            block = block_table[row][position // cache.shape[2]].long()
            kept = block >= 0
            values = cache[block[kept], :, (position % cache.shape[2])[kept]]
            dense[starts[row] + position[kept]] = values
        sides.append(dense)
    return sides[0], sides[1]


def slot_mapping(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, num_tokens: int, block_size: int
) -> Tensor:
    """Slots of the newest tokens of every row, int64 [num_tokens].

    Token i of row b stands at position seq_lens[b] - q_len[b] + i. Negative positions (padding),
    holes and tokens after the last row get -1.
    """
    check_slot_mapping(block_table, seq_lens, cu_seqlens_q, num_tokens, block_size)
    slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=block_table.device)
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        position = torch.arange(length - (end - start), length, device=block_table.device)
        safe = position.clamp(min=0)
        block = block_table[row][safe // block_size].long()
        slot = block * block_size + safe % block_size
        slots[start:end] = torch.where((position >= 0) & (block >= 0), slot, -1)
    return slots


def plan(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    chunk: int,
    deterministic: bool,
) -> Tensor:
    """Work partition of a decode step. The reference has no work to divide: int32 [0]."""
    return torch.empty(0, dtype=torch.int32, device=seq_lens.device)
