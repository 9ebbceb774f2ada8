"""A packed forward: tokens of many requests go through a model as one sequence [1, T].

`PackedCache` writes the keys and values of such a forward into blocks and hands out lazy handles;
packed_attention.py reads the blocks of each request. A model whose own code touches keys and values
gets those of all requests end to end, [1, HKV, S, D], with a mask that keeps requests apart: slow,
but right.

Read first: pykvcache/hf/layer.py, pykvcache/metadata.py. Read next:
pykvcache/hf/packed_attention.py.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from pykvcache.cache import KVPool
from pykvcache.hf.gathering import stored
from pykvcache.hf.handles import LazyTensor, PagedKeys, PagedValues, make_handle
from pykvcache.hf.plans import Plans
from pykvcache.layer_step import LayerStep
from pykvcache.metadata import AttentionMetadata


class PackedMask(LazyTensor):
    """Stands for the mask [1, 1, T, S] of a packed forward, which only models that gather need."""

    cache: PackedCache
    eager: bool

    def dense(self) -> Tensor:
        """True where a query may attend: its own request, causally; for eager, float."""
        self.cache.check_gathers()
        mask = self.cache.dense_mask(0, 0)
        if not self.eager:
            return mask
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, lowest)


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer of a `PackedCache`.

    Args:
        cache: what the layers of a model share.
        index: among the layers.
        group: layer group.
        window, chunk: positions that a query sees; 0 = all.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, cache: PackedCache, index: int, group: int, window: int, chunk: int) -> None:
        self._cache = weakref.ref(cache)  # which holds its layers; without a cycle a pool goes
        self.index, self.group = index, group  # as soon as its engine does
        self.window, self.chunk, self.is_sliding = window, chunk, bool(window or chunk)
        self.is_initialized = True
        self.step: LayerStep | None = None

    @property
    def cache(self) -> PackedCache:
        """What the layers of a model share."""
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pool has its tensors before the first forward."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys [1, HKV, T, D] and values [1, HKV, T, Dv]; returns handles of all blocks."""
        cache = self.cache
        pool, metadata = cache.pool, cache.metadata[self.group]
        k_cache, v_cache = pool.k_caches[self.index], pool.v_caches[self.index]
        assert k_cache is not None and v_cache is not None
        self.dtype, self.device = key_states.dtype, key_states.device
        step, written = self.step, False
        if step is not None and metadata.max_seqlen_q == 1:
            step.bind(k_cache, v_cache, metadata)
            written = step.write(key_states.transpose(0, 2), value_states.transpose(0, 2))
        if not written:
            k, v = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)  # [T, HKV, D]
            k = stored(k, k_cache)
            v = stored(v.to(k.dtype), v_cache)
            scales = pool.k_scales[self.index], pool.v_scales[self.index]
            pool.ops.write_kv(k, v, k_cache, v_cache, metadata.slot_mapping, *scales)
        heads, total = k_cache.shape[1], cache.total_kv
        keys = make_handle(PagedKeys, self, 0, (1, heads, total, k_cache.shape[3]))
        return keys, make_handle(PagedValues, self, 0, (1, heads, total, v_cache.shape[3]))

    def gather(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all requests, end to end: [1, HKV, S, D | Dv].

        Raises:
            ValueError: the layer sees a part of the past only, which the mask would have to say.
        """
        self.cache.check_gathers()
        if self.is_sliding:
            raise self.cache.refusal(
                f"layer {self.index} has a window of {self.window or self.chunk} tokens and code "
                f"that touches its keys"
            )
        pool, metadata = self.cache.pool, self.cache.metadata[self.group]
        ends = metadata.seq_lens.cumsum(0).to(torch.int32)
        k, v = pool.gather(
            self.index,
            metadata.block_table,
            metadata.seq_lens,
            nn.functional.pad(ends, (1, 0)),
            self.cache.total_kv,
            self.dtype,
        )
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys of all requests, 0); only asked for where the model builds masks itself."""
        return self.cache.total_kv, 0

    def get_seq_length(self) -> int:
        """0: positions are given with every forward."""
        return 0

    def get_max_length(self) -> int:
        """The window or chunk, or -1."""
        return self.window or self.chunk or -1


def check_memory(name: str, blocks: int, price: int, device: torch.device) -> None:
    """Refuse a pool that the device could not hold even if nothing else were there.

    Raises:
        MemoryError: with the argument's name and the numbers.
    """
    if device.type == "cuda":
        limit = torch.cuda.mem_get_info(device)[1]
    else:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = blocks * price <= limit
    if fits and device.type == "cpu":
        try:  # costs nothing: pages are taken when they are written; a limit of the process shows
            torch.empty(blocks * price, dtype=torch.uint8)
        except RuntimeError:
            fits = False
    if not fits:
        raise MemoryError(
            f"{name} is too large: {blocks} blocks of {price} bytes cannot be allocated on "
            f"{device}, which has {limit} bytes in all"
        )


class PackedCache(Cache):  # type: ignore[misc]
    """Blocks of all requests, as the cache of packed forwards.

    Args:
        model: whose layers are cached.
        settings: arguments of `KVPool` but the layers.

    Raises:
        ValueError: the model has layers that are no plain attention, or none at all; its name and
            the reason are in the message.
    """

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        self._name = type(model).__name__
        config = model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or []
        chunk = getattr(config, "attention_chunk_size", None) or 0
        reaches: list[tuple[int, int]] = []  # (window, chunk) of each group
        group_of: list[int] = []
        stock = DynamicCache(config=config).layers
        paged: list[int] = []
        for index, layer in enumerate(stock):
            if type(layer).__name__ == "DummyLayer":  # reads the keys of another layer
                continue
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise self.refusal(
                    f"layer {index} keeps a {type(layer).__name__}, not plain keys and values"
                )
            size = getattr(layer, "sliding_window", None) or 0
            chunked = index < len(kinds) and kinds[index] == "chunked_attention"
            limits = (0, chunk) if chunked else (size, 0)
            if limits not in reaches:
                reaches.append(limits)
            group_of.append(reaches.index(limits))
            paged.append(index)
        if not group_of:
            raise self.refusal("it caches no keys")
        self.windows = [window for window, _ in reaches]
        self.chunks = [size for _, size in reaches]
        reach = [window or size for window, size in reaches]
        self.pool = KVPool(group_of, windows=reach, **settings)
        self.metadata: list[AttentionMetadata] = []  # of the current forward, by group
        self.total_kv, self._any_length = 0, False
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._plans = Plans(self.pool)
        self.paged = paged  # layers of the model that are PackedLayers
        for position, index in enumerate(paged):
            group = group_of[position]
            stock[index] = PackedLayer(self, position, group, *reaches[group])
        super().__init__(layers=stock)

    def refusal(self, reason: str) -> ValueError:
        """What to raise when the model turns out not to go with packing."""
        return ValueError(f"{self._name} cannot be packed: {reason}")

    def open(self, shapes: list[tuple[Tensor, Tensor]]) -> None:
        """Take the memory of all layers, whose keys and values look like `shapes`.

        Raises:
            ValueError: the pool's memory is less than one block.
            MemoryError: it is more than there is; seen before anything of that size is made.
        """
        pool, price = self.pool, self.pool.price(shapes)
        name = "num_blocks" if pool.memory is None else "memory"
        if pool.memory is not None:
            pool.fixed_blocks, pool.memory = pool.memory // price, None
            if pool.fixed_blocks == 0:
                raise ValueError(f"memory must hold at least one block of {price} bytes")
        if pool.fixed_blocks is not None:
            check_memory(name, pool.fixed_blocks, price, shapes[0][0].device)
        try:
            pool.open(*shapes[0], wanted=1)
        except MemoryError as error:
            raise MemoryError(
                f"{name} is too large: no memory for a list of {pool.fixed_blocks} blocks"
            ) from error
        for index, (k, v) in zip(self.paged, shapes, strict=True):
            layer = self.layers[index]
            pool.bind(layer.index, k, v)
            if pool.ops.backend == "cpu" and LayerStep.supports(pool.caches(layer.index)[0]):
                layer.step = LayerStep(pool.deterministic)

    def begin(self, metadata: list[AttentionMetadata], total_kv: int | None) -> None:
        """The next forward is for these rows, by group; total_kv is the sum of their lengths.

        None: it is not known, as the forward is captured for rows of any length.
        """
        self.metadata, self.total_kv, self._any_length = metadata, total_kv or 0, total_kv is None
        self._masks.clear()
        self._plans.clear()

    def check_gathers(self) -> None:
        """Raise RuntimeError where the number of keys is not known."""
        if self._any_length:
            raise RuntimeError("its code touches keys, of which each step has another number")

    def plan(self, layer: PackedLayer, q: Tensor) -> Tensor | None:
        """Work partition for queries [T, HQ, D] of a layer."""
        metadata, k_cache = self.metadata[layer.group], self.pool.caches(layer.index)[0]
        return self._plans.plan(q, k_cache, metadata, layer.group, layer.window, layer.chunk)

    def mask(self, dtype: torch.dtype, eager: bool) -> PackedMask:
        """What to pass to the model as attention_mask, so that it builds none."""
        tokens = len(self.metadata[0].slot_mapping)
        mask: Any = torch.Tensor._make_wrapper_subclass(
            PackedMask,
            (1, 1, tokens, self.total_kv),
            dtype=dtype if eager else torch.bool,
            device=self.metadata[0].seq_lens.device,
        )
        mask.cache, mask.eager = self, eager
        return mask  # type: ignore[no-any-return]

    def dense_mask(self, window: int, chunk: int) -> Tensor:
        """Bool [1, 1, T, S]: query and key are of one request, and the query may see the key."""
        if (window, chunk) not in self._masks:
            metadata = self.metadata[0]
            rows, seq_lens = len(metadata.seq_lens), metadata.seq_lens.long()
            row = torch.arange(rows, device=seq_lens.device)
            queries = metadata.cu_seqlens_q.diff().long()
            q_row = row.repeat_interleave(queries)  # [T]
            k_row = row.repeat_interleave(seq_lens)  # [S]
            q_ends, k_ends = queries.cumsum(0), seq_lens.cumsum(0)
            q_index = torch.arange(len(q_row), device=row.device)
            k_index = torch.arange(len(k_row), device=row.device)
            q_position = q_index - q_ends[q_row] + seq_lens[q_row]
            k_position = k_index - (k_ends - seq_lens)[k_row]
            q_position, k_position = q_position[:, None], k_position[None]
            seen = (q_row[:, None] == k_row[None]) & (k_position <= q_position)
            if window:
                seen &= k_position > q_position - window
            if chunk:
                seen &= k_position >= q_position // chunk * chunk
            self._masks[window, chunk] = seen[None, None]
        return self._masks[window, chunk]
