"""`patch`: make a transformers model generate through a `PagedCache`, and `unpatch`.

Nothing global changes but two registered names. A patched model differs from before in: the
attention implementation of its (text) config, an override of `_prepare_cache_for_generation` and of
`continuous_batching_context_manager` on the instance, and a forward pre-hook.

Read first: pykvcache/hf/attention.py, pykvcache/hf/state.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from pykvcache import ops
from pykvcache.hf.arguments import check_model
from pykvcache.hf.attention import EAGER_NAME, SDPA_NAME, register
from pykvcache.hf.implementations import Implementations
from pykvcache.hf.loans import not_lent
from pykvcache.hf.parts import generating_parts
from pykvcache.hf.state import PatchState

STATE = "_pykvcache_patch"
PIECES_CONTINUE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
Model = TypeVar("Model", bound=PreTrainedModel)


def _set_implementation(model: PreTrainedModel, implementations: Implementations) -> None:
    """Choose our attention for the text part; models that are off the interface keep their own."""
    if not model._can_set_attn_implementation():
        return
    text = model.config.get_text_config(decoder=True)
    name = EAGER_NAME if implementations.original(text) in ("eager", EAGER_NAME) else SDPA_NAME
    parts = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation({parts[0]: name} if parts else name)
    if not parts:  # its layers may have another config object, which 5.17 passes over
        for part in model.modules():
            if isinstance(part, PreTrainedModel) and type(part.config) is type(model.config):
                part.config._attn_implementation_internal = (
                    model.config._attn_implementation_internal
                )


def _configs(model: nn.Module) -> list[Any]:
    """Configurations of the model and its parts, which name their attention."""
    return [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]


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
    paged = state.new_cache(self, max(int(max_cache_length) + 1, 1))  # may be of numpy
    if generation_config.is_assistant:
        paged.activate_past_recording()
    if inner is cache:
        model_kwargs["past_key_values"] = paged
    else:
        model_kwargs["past_key_values"] = EncoderDecoderCache(paged, cache.cross_attention_cache)
    return result


def _prefill(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Before transformers computes the prompts, see which of their tokens have been computed."""
    state: PatchState = getattr(self, STATE)
    shows = generation_config.output_hidden_states or generation_config.output_attentions
    # Older ones compute the pieces of a prompt from its first token, whatever the cache holds.
    begins = generation_config.prefill_chunk_size is None or PIECES_CONTINUE
    if state.prefixes is not None and begins and not shows and not self.training:
        state.prefixes.begin(model_kwargs.get("past_key_values"), input_ids, model_kwargs)
    prefill = state.original(self, "_prefill")
    return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)


@contextlib.contextmanager
def _continuous_batching_context_manager(
    self: PreTrainedModel, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """`generate_batch` knows only the stock implementations: step aside while it runs."""
    state: PatchState = getattr(self, STATE)
    state.implementations.step_aside()
    try:
        session = state.original(self, "continuous_batching_context_manager")
        with session(*args, **kwargs) as manager:
            yield manager
    finally:
        state.implementations.step_back()


OVERRIDES: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "continuous_batching_context_manager": _continuous_batching_context_manager,
    "_prefill": _prefill,
}


def patch(
    model: Model,
    block_size: int = 16,
    num_blocks: int | None = None,
    memory: int | str | None = None,
    kv_dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    deterministic: bool = False,
    prefix_cache: bool = False,
) -> Model:
    """Let `model.generate` and bare forwards cache keys and values in blocks.

    Args:
        model: a transformers model with attention; changed in place.
        block_size: tokens a block.
        num_blocks: fixed size of each cache's pool; more tokens raise `OutOfBlocks`.
        memory: the same in bytes, or as "4GiB". Without both, the pool fits what `generate` is
            asked for.
        kv_dtype: "auto" (the model's), or a float dtype or its name. "float8_e4m3fn" takes half the
            memory of 16 bits: keys and values are rounded to 3 bits after the leading one, each
            head's vector in units of its own largest number.
        backend: "auto" or a name from `ops.backends()`.
        deterministic: a row's bits do not depend on the other rows of its batch.
        prefix_cache: keep the blocks of earlier calls, all in one pool, and let `generate` begin
            with those that its prompts have in common with them. Changed weights are noticed;
            adapters and hooks that change what the model computes are not.

    Returns:
        The model.

    Raises:
        TypeError: not a transformers model, or an argument of the wrong type.
        ValueError: an argument is out of range, the model has no attention with a key-value cache,
            or it is patched with other settings.
        RuntimeError: the backend cannot be used here.
    """
    check_model(model)
    settings: dict[str, Any] = {
        "block_size": block_size,
        "num_blocks": num_blocks,
        "memory": memory,
        "kv_dtype": kv_dtype,
        "backend": backend,
        "deterministic": deterministic,
        "prefix_cache": prefix_cache,
    }
    present: PatchState | None = model.__dict__.get(STATE)
    if present is not None:
        if present.settings == settings:
            return model
        raise ValueError(
            "model is patched with other settings; call pykvcache.unpatch(model) first"
        )
    parts = generating_parts(model)
    taken: list[PreTrainedModel] = []
    try:
        with not_lent(_configs(model)):
            for part in parts:
                if part is not model and STATE in part.__dict__:
                    patch(part, **settings)  # raises if it is patched with other settings
                    continue
                _patch_part(part, settings, hooked=part is parts[0] or model not in parts)
                taken.append(part)
        if model not in parts:
            model.__dict__[STATE] = PatchState(model, settings)
    except BaseException:
        for part in taken:
            _unpatch_part(part)
        raise
    model.__dict__[STATE].parts = [part for part in taken if part is not model]
    return model


def _patch_part(model: PreTrainedModel, settings: dict[str, Any], hooked: bool) -> None:
    """Patch a model that generates; without hooks where an outer model hears of every forward."""
    state = PatchState(model, settings)
    if state.prefixes is not None and model.config.is_encoder_decoder:
        raise ValueError(f"prefix_cache needs a decoder, {type(model).__name__} has an encoder too")
    state.new_cache(model)
    ops.table(settings["backend"], model.device.type)
    register()
    try:
        _set_implementation(model, state.implementations)
    except BaseException:
        state.implementations.restore()
        raise
    state.implementations.note_chosen()
    shares = state.prefixes is not None
    for name, override in OVERRIDES.items():
        if hasattr(type(model), name) and (shares or name != "_prefill"):
            if name in model.__dict__:
                state.overridden[name] = model.__dict__[name]
            model.__dict__[name] = functools.partial(override, model)  # a bound method of
            # another name could be neither pickled nor copied
    if hooked:
        state.hooks.append(model.register_forward_pre_hook(state.before_forward, with_kwargs=True))
    if hooked and shares:
        state.hooks.append(model.register_forward_hook(state.after_forward, with_kwargs=True))
    model.__dict__[STATE] = state


def unpatch(model: Model) -> Model:
    """Undo `patch`: implementations, methods and hook are what they were. Returns the model.

    Raises:
        ValueError: the model is not patched.
    """
    if not isinstance(model, nn.Module) or STATE not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched")
    with not_lent(_configs(model)):
        _unpatch_part(model)
    return model


def _unpatch_part(model: PreTrainedModel) -> None:
    state: PatchState = model.__dict__.pop(STATE)
    for hook in state.hooks:
        hook.remove()
    for name in OVERRIDES:
        model.__dict__.pop(name, None)
    model.__dict__.update(state.overridden)
    state.implementations.restore()
    for part in state.parts:
        if STATE in part.__dict__:
            _unpatch_part(part)


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
