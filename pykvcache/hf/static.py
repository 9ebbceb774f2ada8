"""`StaticPagedCache`: blocks at fixed addresses, so that a decode step compiles into one graph.

Every layer owns its tensors (views of one buffer would be copied whole by functionalisation).
In a patched model what `update` returns has the layer as an attribute, which survives tracing and
is lost in every operation; our attention function then reads the blocks of that layer. Code that
touches keys or values gets dense ones: a lazy handle outside of graphs, and in a graph tensors that
the compiler drops if nobody reads them. Lengths are tensors, positions count padding, and masks are
dense. Float8 has a scale for each slot and head, as in a pool.

Read first: pykvcache/hf/cache.py, pykvcache/hf/handles.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from pykvcache import ops
from pykvcache.block_layout import QUANTISED, SCALE, LayerCaches
from pykvcache.cache import parse_positive
from pykvcache.errors import OutOfBlocks
from pykvcache.hf.arguments import parse_dtype
from pykvcache.hf.counters import counters
from pykvcache.hf.gathering import packed, stored
from pykvcache.hf.handles import LazyTensor, wrap

LAYER = "_pykvcache_layer"  # attribute of the keys and values that a static layer returns


class StaticHandle(LazyTensor):
    """Keys or values of a static layer, [B, HKV, max_length, D], dense when touched."""

    layer: StaticPagedLayer
    cache: Tensor
    scale: Tensor | None
    _dense: Tensor | None = None

    def dense(self) -> Tensor:
        """Copied out of the blocks once, kept while the handle lives."""
        if self._dense is None:
            counters.gathered += 1
            dense = self.layer.dense(self.cache, self.scale)
            self._dense = dense.contiguous()  # as the handle says it is
        return self._dense


class StaticPagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer of at most `max_length` tokens a row."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        config: PreTrainedConfig,
        max_length: int,
        block_size: int,
        backend: str,
        num_blocks: int | None,
        kv_dtype: torch.dtype | None,
    ) -> None:
        self.config = config
        self.max_length, self.block_size, self.backend = max_length, block_size, backend
        self.num_blocks, self.kv_dtype = num_blocks, kv_dtype
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.is_initialized = False
        self.keys = self.values = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take blocks for all rows of keys [B, HKV, T, D] and values [B, HKV, T, Dv].

        Raises:
            OutOfBlocks: they are more than num_blocks.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        columns = -(-self.max_length // self.block_size)
        blocks = self.batch_size * columns
        if self.num_blocks is not None and blocks > self.num_blocks:
            raise OutOfBlocks(
                f"{self.batch_size} rows of {self.max_length} tokens need {blocks} blocks, "
                f"the pool has {self.num_blocks}",
                blocks,
                self.num_blocks,
                self.num_blocks,
            )
        cells = (blocks, self.num_heads, self.block_size)
        dtype, device = self.kv_dtype or self.dtype, self.device
        k_cache, v_cache = (
            torch.zeros(*cells, x.shape[3], dtype=dtype, device=device)
            for x in (key_states, value_states)
        )
        k_scale = v_scale = None
        if dtype == QUANTISED:
            k_scale, v_scale = (torch.zeros(cells, dtype=SCALE, device=device) for _ in range(2))
        self.caches = LayerCaches(k_cache, v_cache, k_scale, v_scale)
        table = torch.arange(blocks, dtype=torch.int32, device=self.device)
        self.block_table = table.view(self.batch_size, columns)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.ops = ops.table(self.backend, self.device.type)
        if not torch.compiler.is_compiling():
            for tensor in (*self.caches, self.block_table, self.cumulative_length):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens; returns keys and values, in a patched model known by their layer.

        Raises:
            ValueError: they are more than max_length (checked outside graphs), or the number of
                rows or a shape is another than before; nothing was written.
        """
        batch, _, tokens, _ = key_states.shape
        if self.is_initialized and batch != self.batch_size:
            self._begin_anew(batch)
        if not torch.compiler.is_compiling():
            self._check_room(tokens)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seq_lens = (self.cumulative_length + tokens).to(torch.int32).repeat(batch)
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * tokens
        slots = self.ops.slot_mapping(
            self.block_table, seq_lens, cu_seqlens_q, batch * tokens, self.block_size
        )
        k_cache, v_cache, k_scale, v_scale = self.caches
        k, v = packed(key_states, tokens), packed(value_states, tokens)
        if self.kv_dtype is not None:
            k = stored(k, k_cache)
            v = stored(v.to(k.dtype), v_cache)
        self.ops.write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)
        self.cumulative_length.add_(tokens)  # last: the operators may refuse
        self.seq_lens, self.cu_seqlens_q = seq_lens, cu_seqlens_q
        if not str(self.config._attn_implementation).startswith("pykvcache"):
            return self.dense(k_cache, k_scale), self.dense(v_cache, v_scale)
        return self._marked(k_cache, k_scale), self._marked(v_cache, v_scale)

    def _check_room(self, tokens: int) -> None:
        total = int(self.cumulative_length) + tokens
        if total > self.max_length:
            raise ValueError(f"max_length is {self.max_length} but a row would have {total} tokens")

    def _begin_anew(self, batch: int) -> None:
        """Give up the blocks for `batch` rows, which only an empty layer can."""
        if torch.compiler.is_compiling() or int(self.cumulative_length) > 0:
            raise ValueError(f"the cache holds {self.batch_size} rows but keys have {batch}")
        self.is_initialized = False

    def _marked(self, cache: Tensor, scale: Tensor | None) -> Tensor:
        """A cache as [B, HKV, max_length, D] that our attention function knows."""
        if torch.compiler.is_compiling():
            marked = self.dense(cache, scale)
        else:
            shape = (self.batch_size, self.num_heads, self.max_length, cache.shape[3])
            marked = wrap(StaticHandle, shape, dtype=self.dtype, device=cache.device)
            marked.layer, marked.cache, marked.scale = self, cache, scale
        setattr(marked, LAYER, self)
        return marked

    def dense(self, cache: Tensor, scale: Tensor | None) -> Tensor:
        """A cache as [B, HKV, max_length, D] in the model's dtype.

        The rows' blocks stand one after the other.
        """
        heads, dim = cache.shape[1], cache.shape[3]
        if scale is not None:
            cache = cache.float() * scale[..., None]
        cache = cache.to(self.dtype)
        columns = cache.view(self.batch_size, -1, heads, self.block_size, dim).transpose(1, 2)
        return columns.flatten(2, 3)[:, :, : self.max_length]

    def attend(
        self,
        query: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """[B, HQ, T, D] to [B, T, HQ, Dv] over this layer's blocks.

        Args:
            bias: bool or float [B | 1, HQ | 1, T, max_length], or None.
            causal: mask later positions; a bias already does.
        """
        batch, heads, tokens, dim = query.shape
        k_cache, v_cache, k_scale, v_scale = self.caches
        value_dim = v_cache.shape[3]
        out, _ = self.ops.paged_attention(
            stored(packed(query, tokens), k_cache),
            k_cache,
            v_cache,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
            tokens,
            dim**-0.5 if scale is None else scale,
            causal,
            0,
            0,
            softcap or 0.0,
            sinks if sinks is None else sinks.float(),
            None,
            bias,
            k_scale,
            v_scale,
            value_dim,
            None,
            False,
        )
        return out.view(batch, tokens, heads, value_dim).to(query.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, first position) of the keys that masks are for."""
        return self.max_length, 0

    def get_seq_length(self) -> Tensor | int:
        """Tokens seen: a 0-dim tensor once there are any."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Tokens that a row may have."""
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget tokens at the end: -n removes n; a positive n (transformers 5.17) keeps n."""
        tokens, seen = int(tokens_to_remove), int(self.cumulative_length)
        self.cumulative_length.fill_(max(seen + tokens, 0) if tokens <= 0 else min(seen, tokens))

    def reset(self) -> None:
        """Forget everything; addresses stay."""
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row beam_idx[i]; blocks are copied, rows never share."""
        if self.is_initialized:
            for part in self.caches:
                if part is not None:
                    rows = part.view(self.batch_size, -1)
                    rows.copy_(rows[beam_idx.to(self.device)])


class StaticPagedCache(Cache):  # type: ignore[misc]
    """What `PagedCache(..., static=True)` returns.

    Args:
        config: of the model.
        max_length: tokens, padding included, that a row may have.
        block_size: tokens a block.
        num_blocks: most blocks that the rows may take; None = what they need.
        backend: "auto" or a name from `ops.backends()`.
        kv_dtype: "auto" (that of the keys), or a float dtype or its name, as in `patch`.

    Raises:
        ValueError, TypeError: an argument is out of range, or the model has no attention layer.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_length: int,
        block_size: int = 16,
        num_blocks: int | None = None,
        backend: str = "auto",
        kv_dtype: str | torch.dtype = "auto",
    ) -> None:
        dtype = parse_dtype(kv_dtype)
        max_length = parse_positive("max_length", max_length)
        block_size = parse_positive("block_size", block_size)
        layers = StaticCache(config=config, max_cache_len=max_length).layers
        plain = [type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers]
        if not any(plain):
            raise ValueError(
                f"{type(config).__name__} has no attention layer whose keys could be paged"
            )
        for index, is_plain in enumerate(plain):
            if is_plain:
                layers[index] = StaticPagedLayer(
                    config.get_text_config(decoder=True),
                    max_length,
                    block_size,
                    backend,
                    num_blocks,
                    dtype,
                )
        super().__init__(layers=layers)
