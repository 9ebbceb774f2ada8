"""The attention function that transformers calls: reads the blocks behind a cache's handles.

Plain keys and values (no cache, training, cross-attention, encoders, other caches) go to the
implementation that the model had before it was patched; so does an eager model that is asked for
its attention weights.

Read first: pykvcache/hf/masks.py. Read next: pykvcache/hf/patching.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pykvcache import ops
from pykvcache.hf.counters import counters
from pykvcache.hf.gathering import packed, stored
from pykvcache.hf.handles import PagedKeys, PagedValues
from pykvcache.hf.layer import PagedLayer
from pykvcache.hf.masks import LazyMask, align_columns, lazy_eager_mask, lazy_sdpa_mask
from pykvcache.hf.static import LAYER, StaticPagedLayer

SDPA_NAME = "pykvcache"
EAGER_NAME = "pykvcache_eager"
MOST_PLANNED = 128  # tokens of a row; with more of them it is prefill's, which has no plan
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@functools.cache
def _eager_function(module_name: str) -> AttentionFunction:
    """The eager attention of the file that defines an attention module."""
    module = sys.modules[module_name]
    for name in ("eager_attention_forward", "text_eager_attention_forward"):
        if hasattr(module, name):
            return getattr(module, name)  # type: ignore[no-any-return]
    raise ValueError(f"{module_name} has no eager_attention_forward to fall back on")


def dense_attention(
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model did before it was patched."""
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.stock()
    function = _eager_function(type(module).__module__) if eager else sdpa_attention_forward
    out: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, **kwargs
    )
    return out


def is_causal_module(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether no token sees a later one where there is no mask, as transformers decides it."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


Masking = tuple[bool, int, int, Tensor | None]  # causal, window, chunk, bias


def _masking(layer: PagedLayer, mask: Tensor, key: Tensor) -> Masking:
    """How the kernel has to mask: by limits where the mask is plain, else by a dense bias."""
    if isinstance(mask, LazyMask):
        known = mask.padding is None or layer.rows.announced
        window, chunk = mask.limits
        if known and (window or chunk or not layer.window):
            return True, window, chunk, None
        mask = mask.dense()
    return False, 0, 0, _align(layer, mask, key)


def _add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """A mask or bias that also adds a float bias."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _align(layer: PagedLayer, columns: Tensor, key: Tensor) -> Tensor:
    """A mask or bias over the columns of a handle, as one over stored positions."""
    rows, length = layer.rows, key.shape[2]
    pads = None
    if rows.pads is not None:
        pads = torch.tensor(rows.pads, device=columns.device)
    return align_columns(columns[..., :length], layer.seen - length, pads, layer.seen)


def _paged_attention(
    query: Tensor,
    key: PagedKeys,
    attention_mask: Tensor | None,
    value_dim: int,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """[B, HQ, T, D] to [B, T, HQ, Dv] over the blocks of `key`'s layer."""
    counters.paged += 1
    layer = key.layer
    rows = layer.rows
    if not is_causal and rows.notes is not None:  # its keys may depend on tokens that follow
        rows.notes.stop()
    pool, metadata = rows.pool, rows.metadata[layer.group]
    tokens = query.shape[2]
    if attention_mask is None:
        causal = tokens == 1 or is_causal
        window, chunk, bias = layer.window, 0, None
    else:
        causal, window, chunk, bias = _masking(layer, attention_mask, key)
    if position_bias is not None:
        bias = _add_bias(bias, _align(layer, position_bias, key))
    k_cache = pool.k_caches[layer.index]
    assert k_cache is not None
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = sinks.float()
    step = layer.step
    if tokens == 1 and bias is None and step is not None and step.is_bound(k_cache, metadata):
        stepped = step.attend(query, scaling, softcap or 0.0, window, chunk, sinks)
        if stepped is not None:
            return stepped
    q = stored(packed(query, tokens), k_cache)
    cu_seqlens_q, plan = metadata.cu_seqlens_q, None
    if len(q) != len(metadata.slot_mapping):  # a model that asks for its last tokens only (Gemma 4)
        cu_seqlens_q = torch.arange(0, len(q) + 1, tokens, device=q.device, dtype=torch.int32)
        bias = bias if bias is None else bias[:, :, -tokens:]
    elif tokens <= MOST_PLANNED:
        plan = rows.plans.plan(q, k_cache, metadata, layer.group, window, chunk)
    out, _ = pool.ops.paged_attention(
        q,
        k_cache,
        pool.v_caches[layer.index],
        metadata.block_table,
        metadata.seq_lens,
        cu_seqlens_q,
        tokens,
        q.shape[2] ** -0.5 if scaling is None else scaling,
        causal,
        window,
        chunk,
        softcap or 0.0,
        sinks,
        None,
        bias,
        pool.k_scales[layer.index],
        pool.v_scales[layer.index],
        value_dim,
        plan,
        pool.deterministic,
    )
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    if tokens == 1:
        return out.unsqueeze(1)
    return out.view(-1, tokens, out.shape[1], value_dim)


_outside_graph = torch.compiler.disable(_paged_attention)


def attention_function(eager: bool) -> AttentionFunction:
    """What a patched model calls: over blocks where keys are handles, else as it was before."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        wants_weights = eager and kwargs.get("output_attentions", False)
        causal = is_causal_module(module, is_causal)
        if not causal and query.shape[2] > 1 and isinstance(attention_mask, LazyMask):
            attention_mask = None if attention_mask.is_left_out else attention_mask
        if type(key) is PagedKeys and type(value) is PagedValues and not wants_weights:
            attend = _outside_graph if torch.compiler.is_compiling() else _paged_attention
            out = attend(
                query,
                key,
                attention_mask,
                value.shape[3],
                scaling,
                softcap,
                s_aux,
                position_bias,
                causal,
            )
            source = query if query.requires_grad else key.source
            if source is not None:
                out = ops.refuse_gradient(source, out)
            return out, None
        layer: StaticPagedLayer | None = getattr(key, LAYER, None)
        whole = layer is not None and getattr(value, LAYER, None) is layer
        if layer is not None and whole and not wants_weights:
            if position_bias is not None:
                attention_mask = _add_bias(attention_mask, position_bias)
            causal = attention_mask is None and causal
            return layer.attend(query, attention_mask, causal, scaling, softcap, s_aux), None
        given = {
            "scaling": scaling,
            "softcap": softcap,
            "s_aux": s_aux,
            "position_bias": position_bias,
            "is_causal": is_causal,
        }
        kwargs |= {name: argument for name, argument in given.items() if argument is not None}
        return dense_attention(eager, module, query, key, value, attention_mask, **kwargs)

    return attention


def register() -> None:
    """Make both names known to transformers: for models that use sdpa and for eager ones."""
    for name, eager, mask in (
        (SDPA_NAME, False, lazy_sdpa_mask),
        (EAGER_NAME, True, lazy_eager_mask),
    ):
        AttentionInterface.register(name, attention_function(eager))
        AttentionMaskInterface.register(name, mask)
