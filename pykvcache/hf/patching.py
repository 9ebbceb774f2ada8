"""`patch`: make a transformers model generate through a `PagedCache`, and `unpatch`.

Nothing global changes but two registered names. A patched model differs from before in: the
attention implementation of its (text) config, an override of `_prepare_cache_for_generation` and of
`continuous_batching_context_manager` on the instance, and a forward pre-hook.

Read first: pykvcache/hf/attention.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pykvcache import ops
from pykvcache.hf.attention import EAGER_NAME, SDPA_NAME, register
from pykvcache.hf.cache import PagedCache

STATE = "_pykvcache_patch"
OVERRIDES = ("_prepare_cache_for_generation", "continuous_batching_context_manager")
Model = TypeVar("Model", bound=PreTrainedModel)


class PatchState:
    """What `patch` was told, and what `unpatch` has to put back."""

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.mask_name = (
            "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        )
        self.implementations = [
            (config, config._attn_implementation_internal) for config in _configs(model)
        ]
        self.patched_implementations: list[tuple[PreTrainedConfig, str]] = []
        self.overridden: dict[str, Any] = {}  # instance attributes that we replaced
        self.hook: Any = None

    def new_cache(self, config: PreTrainedConfig, max_length: int | None = None) -> PagedCache:
        """An empty cache with the settings of the patch."""
        return PagedCache(config, max_length=max_length, **self.settings)

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
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = self.argument("past_key_values", args, kwargs)
        changed = None
        if cache is None and self._wants_cache(model, args, kwargs):
            cache = self.new_cache(model.config)
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


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and of everything in it, each once."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop(0)
        if id(config) in found:
            continue
        found[id(config)] = config
        children = (getattr(config, name, None) for name in config.sub_configs)
        pending += [child for child in children if isinstance(child, PreTrainedConfig)]
    return list(found.values())


def _set_implementation(model: PreTrainedModel) -> None:
    """Choose our attention for the text part; models that are off the interface keep their own."""
    if not model._can_set_attn_implementation():
        return
    text = model.config.get_text_config(decoder=True)
    name = EAGER_NAME if text._attn_implementation == "eager" else SDPA_NAME
    parts = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)


def _restore(implementations: list[tuple[PreTrainedConfig, Any]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation


def _is_fresh(cache: Any) -> bool:
    """Whether `generate` has just made this cache and would fill it itself."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and not getattr(cache, "_is_user_defined", False)
    )


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """Let transformers prepare its cache, then replace a fresh `DynamicCache`."""
    state: PatchState = getattr(self, STATE)
    prepare = state.original(self, "_prepare_cache_for_generation")
    result = prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if torch.is_grad_enabled() or cache is None:
        return result
    inner = cache.self_attention_cache if type(cache) is EncoderDecoderCache else cache
    if not _is_fresh(inner) or getattr(cache, "_is_user_defined", False):
        return result
    paged = state.new_cache(self.config, max_cache_length + 1)
    if generation_config.is_assistant:
        paged.activate_past_recording()
    if inner is cache:
        model_kwargs["past_key_values"] = paged
    else:
        model_kwargs["past_key_values"] = EncoderDecoderCache(paged, cache.cross_attention_cache)
    return result


@contextlib.contextmanager
def _continuous_batching_context_manager(
    self: PreTrainedModel, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """`generate_batch` knows only the stock implementations: step aside while it runs."""
    state: PatchState = getattr(self, STATE)
    _restore(state.implementations)
    try:
        session = state.original(self, "continuous_batching_context_manager")
        with session(*args, **kwargs) as manager:
            yield manager
    finally:
        _restore(state.patched_implementations)


def patch(
    model: Model,
    block_size: int = 16,
    num_blocks: int | None = None,
    memory: int | str | None = None,
    kv_dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    deterministic: bool = False,
) -> Model:
    """Let `model.generate` and bare forwards cache keys and values in blocks.

    Args:
        model: a transformers model with attention; changed in place.
        block_size: tokens a block.
        num_blocks: fixed size of each cache's pool; more tokens raise `OutOfBlocks`.
        memory: the same in bytes, or as "4GiB". Without both, the pool fits what `generate` is
            asked for.
        kv_dtype: "auto" (the model's), or a float dtype or its name.
        backend: "auto" or a name from `ops.backends()`.
        deterministic: a row's bits do not depend on the other rows of its batch.

    Returns:
        The model.

    Raises:
        TypeError: not a transformers model, or an argument of the wrong type.
        ValueError: an argument is out of range, the model has no attention to page, or it is
            patched with other settings.
        RuntimeError: the backend cannot be used here.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    settings = {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "memory": memory,
        "kv_dtype": kv_dtype,
        "backend": backend,
        "deterministic": deterministic,
    }
    present: PatchState | None = model.__dict__.get(STATE)
    if present is not None:
        if present.settings == settings:
            return model
        raise ValueError(
            "model is patched with other settings; call pykvcache.unpatch(model) first"
        )
    state = PatchState(model, settings)
    _check_model(model, state)
    ops.table(backend, model.device.type)
    register()
    try:
        _set_implementation(model)
    except BaseException:
        _restore(state.implementations)
        raise
    state.patched_implementations = [
        (config, config._attn_implementation_internal) for config, _ in state.implementations
    ]
    for name, override in zip(
        OVERRIDES,
        (_prepare_cache_for_generation, _continuous_batching_context_manager),
        strict=True,
    ):
        if hasattr(type(model), name):
            if name in model.__dict__:
                state.overridden[name] = model.__dict__[name]
            model.__dict__[name] = functools.partial(override, model)  # a bound method of
            # another name could be neither pickled nor copied
    state.hook = model.register_forward_pre_hook(state.before_forward, with_kwargs=True)
    model.__dict__[STATE] = state
    return model


def _check_model(model: PreTrainedModel, state: PatchState) -> None:
    attends_causally = any(getattr(module, "is_causal", False) for module in model.modules())
    if not (model.can_generate() or (attends_causally and "past_key_values" in state.parameters)):
        raise ValueError(f"{type(model).__name__} has no attention with a key-value cache to page")
    state.new_cache(model.config)


def unpatch(model: Model) -> Model:
    """Undo `patch`: implementations, methods and hook are what they were. Returns the model.

    Raises:
        ValueError: the model is not patched.
    """
    state: PatchState | None = (
        model.__dict__.pop(STATE, None) if isinstance(model, nn.Module) else None
    )
    if state is None:
        raise ValueError(f"{type(model).__name__} is not patched")
    state.hook.remove()
    for name in OVERRIDES:
        model.__dict__.pop(name, None)
    model.__dict__.update(state.overridden)
    _restore(state.implementations)
    return model


@contextlib.contextmanager
def patched(model: Model, **settings: Any) -> Iterator[Model]:
    """`patch` for the length of a with block; arguments as there."""
    was_patched = STATE in getattr(model, "__dict__", {})
    patch(model, **settings)
    try:
        yield model
    finally:
        if not was_patched:
            unpatch(model)
