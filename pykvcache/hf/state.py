"""What a patched model carries: its settings, what `unpatch` puts back, and the forward hooks.

Read first: pykvcache/hf/prefixes.py, pykvcache/hf/implementations.py. Read next:
pykvcache/hf/patching.py.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pykvcache.hf.cache import PagedCache
from pykvcache.hf.implementations import Implementations
from pykvcache.hf.prefixes import SharedPrefixes, note


class PatchState:
    """What `patch` was told, and what `unpatch` has to put back."""

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.mask_name = (
            "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        )
        self.implementations = Implementations(model)
        self.parts: list[PreTrainedModel] = []  # inside the model, patched with it
        self.overridden: dict[str, Any] = {}  # instance attributes that we replaced
        self.hooks: list[Any] = []
        self.prefixes = SharedPrefixes() if settings["prefix_cache"] else None

    def new_cache(self, model: PreTrainedModel, max_length: int | None = None) -> PagedCache:
        """An empty cache with the settings of the patch."""
        pool = None
        if self.prefixes is not None:
            self.prefixes.check(model)
            pool = self.prefixes.pool
        cache = PagedCache(model.config, max_length=max_length, pool=pool, **self.settings)
        if self.prefixes is not None:
            self.prefixes.pool = cache.pool
        return cache

    def original(self, model: PreTrainedModel, name: str) -> Any:
        """The method that our override of this name stands in front of."""
        return self.overridden.get(name) or MethodType(getattr(type(model), name), model)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the model's forward, wherever it was given."""
        if name in kwargs:
            return kwargs[name]
        position = self.parameters.index(name) if name in self.parameters else len(args)
        return args[position] if position < len(args) else None

    def before_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: a bare call gets a cache, and the cache hears of padding."""
        cache = self._cache(args, kwargs)
        changed = None
        if cache is None and self._wants_cache(model, args, kwargs):
            cache = self.new_cache(model)
            if model.config.is_encoder_decoder:
                cross = DynamicCache(config=model.config.get_text_config(decoder=True))
                kwargs["past_key_values"] = EncoderDecoderCache(cache, cross)
            else:
                kwargs["past_key_values"] = cache
            changed = args, kwargs
        if type(cache) is EncoderDecoderCache:
            cache = cache.self_attention_cache
        if isinstance(cache, PagedCache):
            mask = self.argument(self.mask_name, args, kwargs)
            if torch.compiler.is_compiling():
                _announce_outside_graph(cache, mask)
            else:
                cache.announce(mask if isinstance(mask, torch.Tensor) else None)
        return changed

    def after_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook, with a prefix cache: the tokens have keys and values now."""
        cache = self._cache(args, kwargs)
        if type(cache) is PagedCache:
            unset = dict.fromkeys({"position_ids"}.intersection(self.parameters))
            named = dict(zip(self.parameters, args, strict=False))
            _note_outside_graph(cache, unset | named | kwargs, model.training)

    def _cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        return self.argument("past_key_values", args, kwargs) if cache is None else cache

    def _wants_cache(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        if model.training or torch.is_grad_enabled() or "past_key_values" not in self.parameters:
            return False
        if self.parameters.index("past_key_values") < len(args):
            return False
        use_cache = self.argument("use_cache", args, kwargs)
        if use_cache is None:
            config = model.config.get_text_config(decoder=True)
            use_cache = getattr(config, "use_cache", False)
        return bool(use_cache)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _announce_outside_graph(cache: PagedCache, mask: Any) -> None:
    cache.announce(mask if isinstance(mask, torch.Tensor) else None)


_note_outside_graph = torch.compiler.disable(note)
