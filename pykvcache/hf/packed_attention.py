"""Attention of a packed forward over the blocks of each request, and lending it to a model.

Read first: pykvcache/hf/packed.py. Read next: pykvcache/engine/runner.py.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from pykvcache.hf.attention import dense_attention
from pykvcache.hf.handles import PagedKeys, PagedValues
from pykvcache.hf.masks import lazy_eager_mask, lazy_sdpa_mask
from pykvcache.hf.packed import PackedCache, PackedMask, stored
from pykvcache.hf.reaches import Reaches, note, noted, noting
from pykvcache.layer_step import LayerStep

PACKED_SDPA_NAME = "pykvcache_packed"
PACKED_EAGER_NAME = "pykvcache_packed_eager"
_WITH_MASKS = (
    *("sdpa", "eager", "pykvcache", "pykvcache_eager"),
    *(PACKED_SDPA_NAME, PACKED_EAGER_NAME),  # in use by another thread
)


def _attend(
    query: Tensor, key: PagedKeys, scale: float | None, softcap: float, sinks: Tensor | None
) -> Tensor:
    """[1, HQ, T, D] to [1, T, HQ, Dv], every row over its own blocks."""
    layer: Any = key.layer
    cache: PackedCache = layer.cache
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
        None,
        None,
        v_cache.shape[3],
        cache.plan(layer, q),
        pool.deterministic,
    )
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    return out[None]


def _packed_function(eager: bool) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if type(key) is PagedKeys and type(value) is PagedValues:
            return _attend(query, key, scaling, softcap or 0.0, s_aux), None
        note(module, attention_mask)
        if isinstance(attention_mask, PackedMask):
            attention_mask = attention_mask.dense()
        given = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: argument for name, argument in given.items() if argument is not None}
        return dense_attention(eager, module, query, key, value, attention_mask, **kwargs)

    return attention


@contextlib.contextmanager
def observed(model: PreTrainedModel) -> Iterator[Reaches | None]:
    """Run the model as it is and note what its masks show; None: its attention takes no masks."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation_internal not in _WITH_MASKS:
        yield None
        return
    with packed_attention(model), noted() as reaches:
        yield reaches


@dataclass
class _Loan:
    """A configuration that names the packed attention, the name it had, and who needs that."""

    config: Any
    before: str | None
    threads: set[int] = field(default_factory=set)


_loans: dict[int, _Loan] = {}  # by id of the configuration
_loans_lock = threading.Lock()


@contextlib.contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Let the model attend through a `PackedCache` inside a with block; yields whether it is eager.

    Several threads may do so at once; the last to leave gives the model its own attention back.
    """
    config = model.config.get_text_config(decoder=True)
    thread = threading.get_ident()
    try:
        yield _borrow(config, thread)
    finally:
        _give_back(config, thread)


def _borrow(config: Any, thread: int) -> bool:
    with _loans_lock:
        loan = _loans.get(id(config))
        if loan is None:
            loan = _loans[id(config)] = _Loan(config, config._attn_implementation_internal)
        loan.threads.add(thread)
        eager = loan.before in ("eager", "pykvcache_eager")
        config._attn_implementation_internal = PACKED_EAGER_NAME if eager else PACKED_SDPA_NAME
        return eager


def _give_back(config: Any, thread: int) -> None:
    with _loans_lock:
        loan = _loans.get(id(config))
        if loan is None:
            return
        loan.threads.discard(thread)
        if not loan.threads:
            config._attn_implementation_internal = loan.before
            del _loans[id(config)]


def register() -> None:
    """Make both names known to transformers."""
    for name, eager, mask, stock in (
        (PACKED_SDPA_NAME, False, lazy_sdpa_mask, sdpa_mask),
        (PACKED_EAGER_NAME, True, lazy_eager_mask, eager_mask),
    ):
        AttentionInterface.register(name, _packed_function(eager))
        AttentionMaskInterface.register(name, noting(mask, stock))
