"""Tensors between the layouts of models and of blocks: packed tokens, and dense keys and values.

Read next: pykvcache/hf/rows.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pykvcache.block_layout import compute_dtype

if TYPE_CHECKING:
    from pykvcache.hf.layer import PagedLayer


def packed(x: Tensor, tokens: int) -> Tensor:
    """[B, H, T, D] as packed tokens [B * T, H, D], without a copy where strides allow."""
    if x.requires_grad:
        x = x.detach()
    x = x.squeeze(2) if tokens == 1 else x.transpose(1, 2).flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def stored(x: Tensor, cache: Tensor) -> Tensor:
    """Queries, keys or values as operators take them with this cache.

    They are of another dtype after autocast, or where kv_dtype was given.
    """
    dtype = compute_dtype(x, cache)
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def gather(layer: PagedLayer, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Dense keys and values of padded positions [start, end): [B, HKV, end - start, D | Dv].

    Positions of padding that is not stored, and those released, are zero.
    """
    rows = layer.rows
    pool, seqs = rows.pool, rows.seqs
    device = pool.caches(layer.index)[0].device
    pads = np.array(rows.pads or [0] * len(seqs), np.int64)
    first_block = max(start - int(pads.max()), 0) // pool.block_size
    skipped = first_block * pool.block_size
    lengths = np.maximum(end - pads - skipped, 0)
    table = rows.allocator.block_table(seqs, layer.group)[:, first_block:]
    ends = torch.from_numpy(lengths.cumsum())
    packed_k, packed_v = pool.gather(
        layer.index,
        torch.from_numpy(np.ascontiguousarray(table)).to(device),
        torch.from_numpy(lengths.astype(np.int32)).to(device),
        torch.nn.functional.pad(ends, (1, 0)).to(device, torch.int32),
        int(lengths.sum()),
        layer.dtype,
    )
    position = torch.arange(start, end) - torch.from_numpy(pads)[:, None]  # [B, n], stored
    index = (ends - torch.from_numpy(lengths))[:, None] + position - skipped
    padding = (position < 0).to(device)
    index = index.masked_fill(position < 0, 0).to(device)
    return _pick(packed_k, index, padding), _pick(packed_v, index, padding)


def _pick(packed_rows: Tensor, index: Tensor, padding: Tensor) -> Tensor:
    """packed_rows [N, H, D] at index [B, n] as [B, H, n, D], zero where padding."""
    if len(packed_rows) == 0:
        shape = (*index.shape, *packed_rows.shape[1:])
        return packed_rows.new_zeros(shape).transpose(1, 2)
    dense = packed_rows[index].masked_fill(padding[..., None, None], 0)
    return dense.transpose(1, 2).contiguous()
