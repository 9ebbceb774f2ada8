"""pytest plugin: blocks in place of `sdpa` and `DynamicCache` in every model of the process.

Made to run transformers' own tests, from a checkout of them and with this folder on PYTHONPATH:
`pytest -p everywhere tests/models/llama`, compared with the same run without the plugin. Models
that have no sdpa need PYKVCACHE_EVERYWHERE=eager.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pykvcache.hf import PagedCache, counters
from pykvcache.hf.attention import EAGER_NAME, SDPA_NAME, register


def pytest_configure(config: pytest.Config) -> None:
    register()
    replaced = os.environ.get("PYKVCACHE_EVERYWHERE", "sdpa")
    name = {"sdpa": SDPA_NAME, "eager": EAGER_NAME}[replaced]
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface.register(replaced, interface._global_mapping[name])
    prepare = GenerationMixin._prepare_cache_for_generation
    call = PreTrainedModel.__call__

    def prepare_paged(self: Any, generation_config: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        result = prepare(self, generation_config, kwargs, *args)
        cache = kwargs.get("past_key_values")
        inner = getattr(cache, "self_attention_cache", cache)
        by_user = getattr(cache, "_is_user_defined", False) or getattr(inner, "offloading", False)
        if type(inner) is DynamicCache and not by_user:
            try:
                paged = PagedCache(self.config, block_size=4, max_length=args[-1] + 1)
            except ValueError:
                return result
            if generation_config.is_assistant:
                paged.activate_past_recording()
            kwargs["past_key_values"] = (
                paged if inner is cache else EncoderDecoderCache(paged, cache.cross_attention_cache)
            )
        return result

    def call_announced(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        cache = getattr(cache, "self_attention_cache", cache)
        if isinstance(cache, PagedCache) and self.can_generate():
            encoder_decoder = self.config.is_encoder_decoder
            name = "decoder_attention_mask" if encoder_decoder else "attention_mask"
            bound = inspect.signature(self.forward).bind_partial(*args, **kwargs).arguments
            mask = bound.get(name)
            cache.announce(mask if isinstance(mask, torch.Tensor) else None)
        return call(self, *args, **kwargs)

    GenerationMixin._prepare_cache_for_generation = prepare_paged
    PreTrainedModel.__call__ = call_announced


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"pykvcache: {counters.snapshot()}")
