"""What users may write for the arguments of caches; for `memory` see pykvcache/sizes.py."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pykvcache.cache import KV_DTYPES
from pykvcache.sizes import parse_memory as parse_memory


def parse_dtype(kv_dtype: str | torch.dtype) -> torch.dtype | None:
    """A dtype that caches may have, from itself or its name; None for "auto".

    Raises:
        ValueError: not such a dtype.
    """
    if isinstance(kv_dtype, str) and kv_dtype == "auto":
        return None
    names = {str(dtype).removeprefix("torch."): dtype for dtype in KV_DTYPES}
    dtype = names.get(kv_dtype) if isinstance(kv_dtype, str) else kv_dtype
    if dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be 'auto' or one of {', '.join(names)}, got {kv_dtype!r}")
    return dtype


def check_config(config: object) -> None:
    """Refuse what is no transformers config.

    Raises:
        TypeError: such as a model, whose config it should have been.
    """
    if isinstance(config, PreTrainedConfig):
        return
    given = type(config).__name__
    hint = ", pass its .config" if hasattr(config, "config") else ""
    raise TypeError(f"config must be a transformers PreTrainedConfig, got {given}{hint}")


def check_model(model: object) -> None:
    """Refuse what is no transformers model.

    Raises:
        TypeError: such as what torch.compile returns.
    """
    if isinstance(model, PreTrainedModel):
        return
    given = type(model).__name__
    hint = "; call model.compile() and pass the model" if hasattr(model, "_orig_mod") else ""
    raise TypeError(f"model must be a transformers PreTrainedModel, got {given}{hint}")
