"""What an engine is bounded by when nobody says: memory, the ends of texts, their length."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel


def default_memory(device: torch.device) -> int:
    """Bytes for a pool whose size nobody chose."""
    if device.type == "cuda":
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(4 * 2**30, free // 4)


def check_switches(**switches: object) -> None:
    """Raise TypeError for an argument that is neither True nor False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def eos_tokens(model: PreTrainedModel) -> list[int]:
    """The end-of-text tokens of the generation config.

    Raises:
        ValueError: they are no token ids.
    """
    eos = model.generation_config.eos_token_id
    if eos is None:
        return []
    try:
        tokens = torch.as_tensor(eos)
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"its dtype is {tokens.dtype}")
    except (TypeError, ValueError, RuntimeError):
        if isinstance(eos, (list, tuple)) and not eos:
            return []
        raise ValueError(
            "eos_token_id of the generation config must be a token id or a list of them, "
            f"got {eos!r:.60}"
        ) from None
    return [int(token) for token in tokens.flatten().tolist()]


def max_length(model: PreTrainedModel) -> tuple[int, str] | None:
    """Longest text that the model can take, and why; None = any."""
    limits = []
    embeddings = model.get_input_embeddings()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        learned = isinstance(module, torch.nn.Embedding) and module is not embeddings
        offset = getattr(module, "offset", 0)
        if learned and positions is not None and module.num_embeddings == positions + offset:
            limits.append((positions, "its learned position embeddings"))
    scaled = longest_position(model)
    if scaled is not None:
        limits.append((scaled - 1, "its temperature tuning, which counts positions itself"))
    rope = rope_limit(model)
    if rope is not None:
        limits.append((rope, "the original range of its rotary embeddings, which change beyond"))
    return min(limits, default=None)


def rope_limit(model: PreTrainedModel) -> int | None:
    """Positions from which on rotary frequencies depend on the longest row of a forward."""
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        config = getattr(module, "config", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind not in ("longrope", "dynamic") or config is None:
                continue
            parameters = config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            limit = parameters.get("original_max_position_embeddings")
            limits.append(int(limit or config.max_position_embeddings))
    return min(limits, default=None)


def longest_position(model: PreTrainedModel) -> int | None:
    """Positions from which on a packed forward would differ; None = none.

    Llama 4 scales queries by positions that it counts itself, from `floor_scale` on.
    """
    scales = [
        int(module.floor_scale)
        for module in model.modules()
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale")
    ]
    return min(scales, default=None)
