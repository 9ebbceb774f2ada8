"""One attention layer of a `PagedCache`: writes into blocks, hands out lazy handles.

Read first: pykvcache/hf/rows.py. Read next: pykvcache/hf/cache.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from pykvcache.hf.gathering import gather, packed, stored
from pykvcache.hf.handles import PagedKeys, PagedValues, make_handle
from pykvcache.hf.rows import Rows
from pykvcache.layer_step import LayerStep


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Stands for a `DynamicLayer`, or for a `DynamicSlidingWindowLayer` when it has a window.

    Args:
        rows: the batch, shared by all layers of the cache.
        index: among the paged layers.
        group: layer group.
        sliding_window: positions that a query sees, its own included; None = all.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, rows: Rows, index: int, group: int, sliding_window: int | None) -> None:
        self.rows, self.index, self.group = rows, index, group
        self.sliding_window, self.is_sliding = sliding_window, sliding_window is not None
        self.window = sliding_window or 0
        self.seen = 0
        self.is_initialized = False
        self.step: LayerStep | None = None
        self._apart: DynamicLayer | None = None

    @property
    def keys(self) -> Tensor | None:
        """Dense keys, as a `DynamicLayer` would hold them; None before the first update."""
        return self._dense_side(0)

    @property
    def values(self) -> Tensor | None:
        """Dense values, as `keys`."""
        return self._dense_side(1)

    def _dense_side(self, side: int) -> Tensor | None:
        if self._apart is not None:
            kept: Tensor = (self._apart.keys, self._apart.values)[side]
            return kept
        if self.seen == 0:
            return None
        return gather(self, self._kept(), self.seen)[side]

    @property
    def record_past(self) -> bool:
        """Whether positions outside the window are kept for a later `crop`."""
        return self.rows.recording

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for keys and values shaped like these, [B, HKV, T, D] and [B, HKV, T, Dv]."""
        pool = self.rows.pool
        with pool.lock:
            if pool.allocator is None:
                self.rows.open(key_states, value_states)
            pool.bind(self.index, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        if pool.ops.backend == "cpu" and LayerStep.supports(pool.caches(self.index)[0]):
            self.step = LayerStep(pool.deterministic)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens; returns handles of what the next attention may read.

        Raises:
            OutOfBlocks: the pool is full; nothing was written.
        """
        if torch.compiler.is_compiling():
            handles: tuple[Tensor, Tensor] = _update_outside_graph(self, key_states, value_states)
            return handles
        rows = self.rows
        batch, heads, tokens, k_dim = key_states.shape
        if not self.is_initialized and rows.expects(self.seen, tokens):
            self.lazy_initialization(key_states, value_states)
        elif self._apart is not None or not self.is_initialized:
            return self._update_apart(key_states, value_states)
        if self.seen == rows.seen:
            rows.append(batch, tokens)
            if rows.pads is not None and self.seen == 0:
                rows.hold(self, key_states, value_states)
        elif self.seen + tokens != rows.seen:
            raise ValueError(
                f"layer {self.index} gets tokens {self.seen} to {self.seen + tokens} but the cache "
                f"is at {rows.seen}: every layer must be updated in every forward"
            )
        with rows.pool.lock:
            self.write(key_states, value_states, tokens)
        start, end = self._kept(), self.seen + tokens
        self.seen = end
        v_dim = value_states.shape[3]
        keys = make_handle(PagedKeys, self, end, (batch, heads, end - start, k_dim))
        if key_states.requires_grad or value_states.requires_grad:
            keys.source = key_states if key_states.requires_grad else value_states
        return keys, make_handle(PagedValues, self, end, (batch, heads, end - start, v_dim))

    def write(self, k: Tensor, v: Tensor, tokens: int) -> None:
        """Scatter k [B, HKV, T, D] and v [B, HKV, T, Dv] into this forward's slots."""
        pool, metadata = self.rows.pool, self.rows.metadata[self.group]
        k_cache, v_cache = pool.k_caches[self.index], pool.v_caches[self.index]
        assert k_cache is not None and v_cache is not None
        if tokens == 1 and self.step is not None:
            self.step.bind(k_cache, v_cache, metadata)
            if self.step.write(k, v):
                return
        k = stored(packed(k, tokens), k_cache)
        v = stored(packed(v, tokens).to(k.dtype), v_cache)
        scales = pool.k_scales[self.index], pool.v_scales[self.index]
        pool.ops.write_kv(k, v, k_cache, v_cache, metadata.slot_mapping, *scales)

    def _update_apart(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer that caches other tokens than the first one did (vision keys) stays dense."""
        if self._apart is None:
            self._apart, self.is_initialized = DynamicLayer(), True
        kept: tuple[Tensor, Tensor] = self._apart.update(k, v)
        return kept

    def gather(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What other code than ours reads of padded positions [start, end).

        Returns:
            Dense keys and values, [B, HKV, end - start, D | Dv].
        """
        self.rows.store_padding(self)
        return gather(self, start, end)

    def _kept(self) -> int:
        """First padded position that a query at `seen` could see."""
        return max(self.seen - self.window + 1, 0) if self.window else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, first position) of the keys that `update` returns for so many new tokens."""
        start = self._kept()
        return self.seen - start + query_length, start

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen if self._apart is None else self._apart.get_seq_length()

    def get_max_length(self) -> int:
        """The window, or -1."""
        return self.sliding_window or -1

    def activate_past_recording(self) -> None:
        """Keep positions outside the window until the next `crop`."""
        self.rows.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `PagedCache.crop` does it for all layers at once."""
        raise RuntimeError("crop the PagedCache, not one of its layers: they share block tables")

    def reset(self) -> None:
        """Forget this layer's tokens; `PagedCache.reset` also frees the blocks."""
        self.seen = 0
        if self._apart is not None:
            self._apart, self.is_initialized = None, False

    def offload(self) -> None:
        """Blocks stay where they are."""

    def prefetch(self) -> None:
        """Blocks stay where they are."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder dense keys; block tables are reordered once, by `PagedCache.reorder_cache`."""
        if self._apart is not None:
            self._apart.reorder_cache(beam_idx)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _update_outside_graph(layer: PagedLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return layer.update(k, v)
