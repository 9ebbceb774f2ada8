"""Which parts of a transformers model generate, and so have a key-value cache to page.

Most models generate themselves. BLIP and its kind have a language model inside whose own
`generate` they call, encoder-decoder wrappers have one as their decoder.

Read next: pykvcache/hf/patching.py.
"""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel


def generating_parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models whose caches are to be paged: the model, or those inside that generate for it.

    Raises:
        ValueError: no part has attention with a key-value cache.
    """
    _check_caches(model)
    inner = [
        part
        for part in model.modules()
        if part is not model
        and isinstance(part, PreTrainedModel)
        and part.can_generate()
        and _takes_cache(part)
    ]
    if _takes_cache(model):
        text = model.config.get_text_config(decoder=True)
        return [model, *(part for part in inner if part.config is text)]
    return inner or [model]


def _takes_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _check_caches(model: PreTrainedModel) -> None:
    name = type(model).__name__
    refusal = f"{name} has no attention with a key-value cache to page"
    if not any(_takes_cache(module) for module in model.modules()):
        raise ValueError(refusal)  # recurrent models, or caches of their own (XLNet, RWKV)
    takes_dynamic = getattr(model, "_supports_default_dynamic_cache", None)
    if takes_dynamic is not None and not takes_dynamic():
        raise ValueError(f"{refusal}: it makes a cache of its own")
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if not (model.can_generate() or (causal and _takes_cache(model))):
        raise ValueError(refusal)
    roles = [getattr(module, "is_decoder", None) for module in model.modules()]
    if not causal and False in roles and True not in roles:
        raise ValueError(f"{refusal}: config.is_decoder is False")
