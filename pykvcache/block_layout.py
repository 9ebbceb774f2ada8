"""Where the keys, values and scales of a layer lie in its storage, block by block.

A block is a row of a storage [num_blocks, elements]: keys [HKV, block_size, D], then values
[HKV, block_size, Dv]. In float8 rows are bytes, and float32 scales of every slot and head follow,
first of the keys: what copies, swaps or shares a block does so with its scales.

Read next: pykvcache/cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

QUANTISED = torch.float8_e4m3fn
SCALE = torch.float32
ALIGNMENT = 16  # bytes that a kernel loads at once, and so those between blocks


class LayerCaches(NamedTuple):
    """What operators take: caches, and for float8 their scales [num_blocks, HKV, block_size]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


@dataclass(frozen=True)
class BlockLayout:
    """One block of a layer.

    Attributes:
        heads, block_size, k_dim, v_dim: HKV, tokens a block, D and Dv.
        dtype: of keys and values.
    """

    heads: int
    block_size: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    @property
    def slots(self) -> int:
        """Vectors of keys in a block, and scales."""
        return self.heads * self.block_size

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of a storage: bytes, where a block has parts of several dtypes."""
        return torch.uint8 if self.dtype == QUANTISED else self.dtype

    @property
    def elements(self) -> int:
        """Of a storage's row, in its dtype."""
        values = self.slots * (self.k_dim + self.v_dim)
        if self.dtype != QUANTISED:
            return values
        return _aligned(_aligned(values) + 2 * self.slots * SCALE.itemsize)

    def fits(self, elements: int, storage_dtype: torch.dtype) -> bool:
        """Whether storages whose rows have so many elements of this dtype can hold the blocks."""
        return elements >= self.elements and storage_dtype == self.storage_dtype

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return self.elements * self.storage_dtype.itemsize

    def views(self, storage: Tensor) -> LayerCaches:
        """The parts of a storage [num_blocks, elements or more]."""
        cells = (len(storage), self.heads, self.block_size)
        split = self.slots * self.k_dim
        end = split + self.slots * self.v_dim
        k, v = (part.view(self.dtype) for part in (storage[:, :split], storage[:, split:end]))
        k, v = k.view(*cells, self.k_dim), v.view(*cells, self.v_dim)
        if self.dtype != QUANTISED:
            return LayerCaches(k, v, None, None)
        begin, size = _aligned(end), self.slots * SCALE.itemsize
        scales = (storage[:, begin + i * size : begin + (i + 1) * size] for i in range(2))
        k_scale, v_scale = (part.view(SCALE).view(cells) for part in scales)
        return LayerCaches(k, v, k_scale, v_scale)


def compute_dtype(x: Tensor, cache: Tensor) -> torch.dtype:
    """What operators want queries, keys or values x in: the cache's dtype, or x's with float8."""
    return x.dtype if cache.dtype == QUANTISED else cache.dtype


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
