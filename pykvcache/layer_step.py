"""`LayerStep`: the write and the attention of one layer in a decode step on the CPU, by address.

What `ops.write_kv` and `ops.paged_attention` do, for the one call that is made most often and with
the least work: one query a row, K, V and q of the caches' dtype, no bias and no scales. It goes
past torch's dispatcher, whose code is cold by the time that a layer needs it again and then costs
more than attention over a short context; see docs/decisions.md.

Read first: pykvcache/metadata.py. Read next: csrc/cpu/layer_step.h.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pykvcache.metadata import AttentionMetadata

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class LayerStep:
    """Bound to the caches of a layer and to the metadata of a batch.

    The caller keeps the caches alive during each call; a pool that grows must be able to drop them.

    Args:
        deterministic: as in `ops.paged_attention`.
    """

    def __init__(self, deterministic: bool = False) -> None:
        from pykvcache import _C

        self._core = _C.LayerStep(deterministic)
        self._deterministic = deterministic
        self._k_cache: Callable[[], Tensor | None] = _nothing
        self._v_cache: Callable[[], Tensor | None] = _nothing
        self._metadata: AttentionMetadata | None = None
        self._dtype: torch.dtype | None = None
        self._k_shape = self._v_shape = torch.Size((0, 1, 0, 0))  # no row

    def __reduce__(self) -> tuple[type[LayerStep], tuple[bool]]:
        """A copy is bound to nothing."""
        return LayerStep, (self._deterministic,)

    @staticmethod
    def supports(k_cache: Tensor) -> bool:
        """Whether a cache can be bound: float32, float16 or bfloat16 on the CPU."""
        return k_cache.is_cpu and k_cache.dtype in DTYPES

    def bind(self, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata) -> None:
        """Use these from the next call on; free when nothing has changed.

        Args:
            k_cache, v_cache: [num_blocks, HKV, block_size, D | Dv], one dtype.
            metadata: of a step with one query a row.
        """
        if k_cache is not self._k_cache() or v_cache is not self._v_cache():
            k_side, v_side = _describe(k_cache), _describe(v_cache)
            self._core.set_caches(k_side, v_side, DTYPES[k_cache.dtype], k_cache.shape[2])
            self._k_cache, self._v_cache = weakref.ref(k_cache), weakref.ref(v_cache)
            self._dtype = k_cache.dtype
            self._metadata = None
        if metadata is not self._metadata:
            table, slots = metadata.block_table, metadata.slot_mapping
            self._core.set_batch(
                table.data_ptr(),
                table.shape[1],
                metadata.seq_lens.data_ptr(),
                metadata.cu_seqlens_q.data_ptr(),
                slots.data_ptr(),
                len(slots),
            )
            self._metadata = metadata
            heads = k_cache.shape[1]
            self._k_shape = torch.Size((len(slots), heads, 1, k_cache.shape[3]))
            self._v_shape = torch.Size((len(slots), heads, 1, v_cache.shape[3]))

    def is_bound(self, k_cache: Tensor, metadata: AttentionMetadata) -> bool:
        """Whether the last `bind` was to these."""
        return k_cache is self._k_cache() and metadata is self._metadata

    def write(self, k: Tensor, v: Tensor) -> bool:
        """Store k [B, HKV, 1, D] and v [B, HKV, 1, Dv]; False if the operator has to do it."""
        k_row, k_head, _, k_last = k.stride()
        v_row, v_head, _, v_last = v.stride()
        if not (
            type(k) is type(v) is Tensor
            and k_last == 1
            and v_last == 1
            and k.shape == self._k_shape
            and v.shape == self._v_shape
            and k.dtype is self._dtype
            and v.dtype is self._dtype
            and k.is_cpu
            and v.is_cpu
        ):
            return False
        self._core.write(k.data_ptr(), k_row, k_head, v.data_ptr(), v_row, v_head)
        return True

    def attend(
        self,
        q: Tensor,
        scale: float | None,
        softcap: float,
        window: int,
        chunk: int,
        sinks: Tensor | None,
    ) -> Tensor | None:
        """[B, HQ, 1, D] to [B, 1, HQ, Dv], by `ops.paged_attention`'s rules; None if that has to.

        Args:
            q: the queries.
            scale: default D ** -0.5.
            softcap, window, chunk: 0 = off.
            sinks: float32 [HQ].
        """
        row, head, _, last = q.stride()
        batch, heads, _, dim = q.shape
        kv_heads = self._k_shape[1]
        sinks_address = 0
        if sinks is not None:
            if sinks.shape != (heads,) or not sinks.is_contiguous() or not sinks.is_cpu:
                return None
            sinks_address = sinks.data_ptr()
        if not (
            type(q) is Tensor
            and last == 1
            and batch == self._k_shape[0]
            and dim == self._k_shape[3]
            and heads % kv_heads == 0
            and q.dtype is self._dtype
            and q.is_cpu
        ):
            return None
        out = q.new_empty((batch, 1, heads, self._v_shape[3]))
        self._core.attend(
            q.data_ptr(),
            row,
            head,
            heads,
            dim**-0.5 if scale is None else scale,
            softcap,
            window,
            chunk,
            sinks_address,
            out.data_ptr(),
        )
        return out


def _nothing() -> None:
    """Stands for a reference to a cache that was never bound."""


def _describe(cache: Tensor) -> tuple[int, ...]:
    """Address, num_blocks, HKV, D, and the strides of block, head and slot."""
    num_blocks, heads, _, dim = cache.shape
    return (cache.data_ptr(), num_blocks, heads, dim, *cache.stride()[:3])
