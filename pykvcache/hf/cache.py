"""`PagedCache`: a transformers cache whose plain attention layers keep keys and values in blocks.

Read first: pykvcache/hf/layer.py. Read next: pykvcache/hf/attention.py.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from pykvcache.cache import KVPool, parse_positive
from pykvcache.hf.arguments import check_config, parse_dtype, parse_memory
from pykvcache.hf.layer import PagedLayer
from pykvcache.hf.rows import Rows
from pykvcache.hf.static import StaticPagedCache
from pykvcache.plot import plot_blocks


class PagedCache(DynamicCache):  # type: ignore[misc]
    """Drop-in for `DynamicCache`; linear, hybrid and shared layers stay what they are there.

    Args:
        config: of the model.
        num_blocks: fixed size of the pool, all layer groups together.
        block_size: tokens a block.
        memory: fixed size in bytes, or as "4GiB"; instead of num_blocks.
        kv_dtype: "auto" (that of the keys), or a float dtype or its name, as in `patch`.
        backend: "auto" or a name from `ops.backends()`.
        deterministic: a row's bits do not depend on the other rows of its batch.
        max_length: padded length that no row will exceed, if known: sizes a pool that is not fixed.
        static: make a `StaticPagedCache` of max_length tokens a row, which `generate` can compile.
        prefix_cache: keep blocks to be found by their tokens; a patched model makes use of it.
        pool: that of an earlier cache for this model, to share.

    Without num_blocks and memory the pool grows as needed.

    Raises:
        ValueError, TypeError: an argument is out of range, or the model has no attention layer.
    """

    def __new__(cls, *args: Any, static: bool = False, **settings: Any) -> Any:
        """A `PagedCache`, or with static=True a `StaticPagedCache`."""
        if static:
            return _static_cache(*args, **settings)
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig,
        num_blocks: int | None = None,
        block_size: int = 16,
        *,
        memory: int | str | None = None,
        kv_dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        deterministic: bool = False,
        max_length: int | None = None,
        static: bool = False,
        prefix_cache: bool = False,
        pool: KVPool | None = None,
    ) -> None:
        check_config(config)
        if max_length is not None:
            max_length = parse_positive("max_length", max_length)
        layers = DynamicCache(config=config).layers
        windows: list[int] = []
        group_of: list[int] = []
        paged: list[int] = []
        for index, layer in enumerate(layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                continue
            window = getattr(layer, "sliding_window", None) or 0
            if window not in windows:
                windows.append(window)
            group_of.append(windows.index(window))
            paged.append(index)
        if not paged:
            raise ValueError(
                f"{type(config).__name__} has no attention layer whose keys could be paged"
            )
        stateful = [layer for layer in layers if type(layer).__name__ != "DummyLayer"]
        if prefix_cache and len(paged) < len(stateful):
            raise ValueError(
                f"prefix_cache needs attention in every layer: {type(config).__name__} has "
                f"{len(stateful)} layers with a state, of which {len(paged)} can be paged"
            )
        if pool is None:
            pool = KVPool(
                group_of,
                block_size,
                num_blocks=num_blocks,
                memory=parse_memory(memory),
                kv_dtype=parse_dtype(kv_dtype),
                backend=backend,
                deterministic=deterministic,
                prefix_cache=prefix_cache,
                windows=windows,
            )
        self.rows = Rows(pool, windows, max_length)
        for position, index in enumerate(paged):
            group = group_of[position]
            layers[index] = PagedLayer(self.rows, position, group, windows[group] or None)
        Cache.__init__(self, layers=layers)
        self._is_sliding: list[bool] = Cache.is_sliding.fget(self)
        self._is_linear: list[bool] = Cache.is_linear.fget(self)
        self._is_dummy: list[bool] = Cache.is_dummy.fget(self) if hasattr(Cache, "is_dummy") else []

    is_compileable = False

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have a window; asked for in every forward, so it is not recomputed."""
        return self._is_sliding

    @property
    def is_linear(self) -> list[bool]:
        """Which layers are linear attention."""
        return self._is_linear

    @property
    def is_dummy(self) -> list[bool]:
        """Which layers hold nothing."""
        return self._is_dummy

    @property
    def pool(self) -> KVPool:
        """The blocks and their allocator; copies of a cache share them."""
        return self.rows.pool

    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PagedLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens of a layer; returns handles of its keys and values.

        Args:
            key_states, value_states: [B, HKV, T, D] and [B, HKV, T, Dv].
            layer_idx: of the model.
        """
        states: tuple[Tensor, Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return states

    def announce(self, attention_mask: Tensor | None) -> None:
        """Take note of the 2D mask [B, seen + T] of the forward that begins.

        Left padding in it is not stored. A patched model calls this itself.
        """
        self.rows.announce(attention_mask)

    def begin_layers(self, seen: int) -> None:
        """The rows were given `seen` positions that earlier caches have computed."""
        for layer in self._paged():
            layer.seen = seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row beam_idx[i]; blocks are shared until one is written."""
        self.rows.select(beam_idx.tolist())
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, sharing its blocks."""
        rows = len(self.rows.seqs) if self.rows.seen else 0
        self.rows.select([row for row in range(rows) for _ in range(repeats)])
        for layer in self._others():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (bool or integers)."""
        index = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.rows.select(index.tolist())
        for layer in self._others():
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens at the end: -n removes n. In transformers 5.17 a positive n keeps n.

        Raises:
            ValueError: a positive n in a later transformers; nothing has changed.
        """
        tokens = int(tokens_to_remove)
        if tokens > 0:
            DynamicLayer().crop(tokens)  # an empty layer, to refuse what transformers refuses
        remove = -tokens if tokens <= 0 else max(self.rows.seen - tokens, 0)
        for layer in self._others():
            layer.crop(-remove)
        if self.rows.seen:
            self.rows.crop(remove)
        for paged in self._paged():
            paged.seen = min(paged.seen, self.rows.seen)

    def reset(self) -> None:
        """Forget everything and give the blocks back; the pool stays allocated."""
        self.rows.reset()
        for layer in self.layers:
            layer.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A cache with the same tokens; blocks are shared and copied when either cache writes."""
        copy: PagedCache = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.rows)] = self.rows.fork()
        for name, attribute in self.__dict__.items():
            setattr(copy, name, deepcopy(attribute, memo))
        return copy

    def stats(self) -> dict[str, Any]:
        """Sizes and the split of the pool; see `PoolStats` for what the shares count."""
        pool = self.pool
        sizes = {
            "block_size": pool.block_size,
            "num_blocks": pool.num_blocks,
            "block_bytes": pool.block_bytes,
            "pool_bytes": pool.allocated_bytes,
        }
        if pool.allocator is None:
            return sizes
        stats = pool.allocator.stats()
        return sizes | {
            "used_blocks": stats.used_blocks,
            "peak_blocks": stats.peak_blocks,
            "peak_bytes": stats.peak_blocks * pool.block_bytes,
            "tokens": stats.tokens,
            "copies": stats.copies,
            "sharing_factor": stats.sharing_factor,
            "percent": stats.percent(),
        }

    def plot(self, path: str | Path) -> None:
        """Save a picture of the pool, blocks coloured by row.

        Raises:
            ValueError: the cache is empty. ImportError: matplotlib is not installed.
        """
        if self.pool.allocator is None or self.rows.seen == 0:
            raise ValueError("the cache is empty, there are no blocks to plot")
        plot_blocks(self.pool.allocator, self.rows.seqs.tolist(), path)


def _static_cache(
    config: PreTrainedConfig,
    num_blocks: int | None = None,
    block_size: int = 16,
    *,
    max_length: int | None = None,
    backend: str = "auto",
    kv_dtype: str | torch.dtype = "auto",
    **unsupported: Any,
) -> StaticPagedCache:
    check_config(config)
    if max_length is None:
        raise ValueError("static=True needs max_length, the tokens that a row may have")
    if unsupported:
        raise ValueError(f"static=True does not take {', '.join(sorted(unsupported))}")
    return StaticPagedCache(config, max_length, block_size, num_blocks, backend, kv_dtype)
