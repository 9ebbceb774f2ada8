"""Attention of a packed forward over the blocks of each request, and lending it to a model.

Read first: pykvcache/hf/packed.py. Read next: pykvcache/engine/runner.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from pykvcache.hf.attention import EAGER_NAME, attention_function, is_causal_module
from pykvcache.hf.gathering import stored
from pykvcache.hf.handles import PagedKeys, PagedValues
from pykvcache.hf.loans import lent
from pykvcache.hf.masks import lazy_eager_mask, lazy_sdpa_mask
from pykvcache.hf.packed import PackedCache, PackedLayer, PackedMask
from pykvcache.hf.reaches import Reaches, note, noted, noting
from pykvcache.layer_step import LayerStep

PACKED_SDPA_NAME = "pykvcache_packed"
PACKED_EAGER_NAME = "pykvcache_packed_eager"
OWN_EAGER = frozenset({"eager", EAGER_NAME})
SEES_LATER = "lets tokens see later ones"


def _attend(
    query: Tensor, layer: PackedLayer, scale: float | None, softcap: float, sinks: Tensor | None
) -> Tensor:
    """[1, HQ, T, D] to [1, T, HQ, Dv], every row over its own blocks."""
    cache = layer.cache
    pool, metadata = cache.pool, cache.metadata[layer.group]
    k_cache, v_cache = pool.k_caches[layer.index], pool.v_caches[layer.index]
    assert k_cache is not None and v_cache is not None
    if sinks is not None and sinks.dtype != torch.float32:
        sinks = sinks.float()
    step: LayerStep | None = layer.step
    if step is not None and metadata.max_seqlen_q == 1 and step.is_bound(k_cache, metadata):
        rows = query.transpose(0, 2)  # [T, HQ, 1, D]
        stepped = step.attend(rows, scale, softcap, layer.window, layer.chunk, sinks)
        if stepped is not None:
            return stepped.transpose(0, 1)
    q = stored(query[0].transpose(0, 1), k_cache)
    out, _ = pool.ops.paged_attention(
        q,
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.seq_lens,
        metadata.cu_seqlens_q,
        metadata.max_seqlen_q,
        query.shape[3] ** -0.5 if scale is None else scale,
        True,
        layer.window,
        layer.chunk,
        softcap,
        sinks,
        None,
        None,
        pool.k_scales[layer.index],
        pool.v_scales[layer.index],
        v_cache.shape[3],
        cache.plan(layer, q),
        pool.deterministic,
    )
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    return out[None]


def _check(
    module: nn.Module,
    cache: PackedCache,
    mask: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool | None,
) -> None:
    """Raise ValueError unless a layer of a packed forward asks to be causal, and nothing else."""
    if not is_causal_module(module, is_causal):
        reason = SEES_LATER
    elif not (mask is None or isinstance(mask, PackedMask)):
        reason = "makes an attention mask of its own"
    elif position_bias is not None:
        reason = "adds a position bias"
    else:
        return
    index = getattr(module, "layer_idx", None)
    layer = type(module).__name__ if index is None else f"layer {index} ({type(module).__name__})"
    raise cache.refusal(f"{layer} {reason}")


def _packed_function(eager: bool) -> Any:
    """Attention over blocks where keys are of a packed forward, else that of a patched model.

    Such a model may generate in another thread.
    """
    usual = attention_function(eager)

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
        layer: Any = key.layer if type(key) is PagedKeys else None
        if isinstance(layer, PackedLayer) and type(value) is PagedValues:
            _check(module, layer.cache, attention_mask, position_bias, is_causal)
            return _attend(query, layer, scaling, softcap or 0.0, s_aux), None
        note(module, attention_mask)
        if isinstance(attention_mask, PackedMask):
            _check(module, attention_mask.cache, None, None, is_causal)  # a bias is passed on
            attention_mask = attention_mask.dense()
        return usual(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            softcap=softcap,
            s_aux=s_aux,
            position_bias=position_bias,
            is_causal=is_causal,
            **kwargs,
        )

    return attention


@contextlib.contextmanager
def observed(model: PreTrainedModel) -> Iterator[Reaches]:
    """Run the model with its masks built, whatever its own attention is; notes their reach."""
    with packed_attention(model), noted() as reaches:
        yield reaches


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Let the model attend through a `PackedCache` inside a with block; yields whether it is eager.

    Several threads may do so at once; the last to leave gives the model its own attention back.
    """
    config = model.config.get_text_config(decoder=True)
    with lent(config, PACKED_SDPA_NAME, PACKED_EAGER_NAME, OWN_EAGER) as eager:
        yield eager


def register() -> None:
    """Make both names known to transformers."""
    for name, eager, mask, stock in (
        (PACKED_SDPA_NAME, False, lazy_sdpa_mask, sdpa_mask),
        (PACKED_EAGER_NAME, True, lazy_eager_mask, eager_mask),
    ):
        AttentionInterface.register(name, _packed_function(eager))
        AttentionMaskInterface.register(name, noting(mask, stock))
