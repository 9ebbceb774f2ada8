"""What the tuner must know of a model: its heads, its layers, and how many weights a step reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from pykvcache.bench.replay.configs import ModelConfig, config_file, known_configs, load_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Attention of a model: layers of HQ query and HKV key heads, all D wide."""

    name: str
    layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    parameters: float | None
    """Weights that a step reads; None = not known."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.torch_dtype.itemsize

    @property
    def weight_bytes(self) -> float | None:
        return None if self.parameters is None else self.parameters * self.torch_dtype.itemsize

    def config(self) -> ModelConfig:
        """For the replay: bytes of a token with this dtype."""
        elements = 2 * self.num_kv_heads * self.head_dim
        return ModelConfig(self.name, self.layers, elements, self.torch_dtype.itemsize)


def load_shape(name: str, dtype: str) -> Shape:
    """The shape of a packaged model, or of a Hugging Face config.json or its folder.

    Raises:
        ValueError: unknown model or dtype, or one whose cache has no heads (latents).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = load_config(name)  # raises for what cannot be read
    row: dict[str, Any] | None = known_configs().get(name.lower())
    if row is None:
        return _from_file(config, _fields(name), dtype)
    if "latent_dim" in row:
        raise ValueError(f"{name} caches latents, which tune does not measure")
    return Shape(
        config.name, row["layers"], row["heads"], row["kv_heads"], row["head_dim"], dtype,
        1e9 * row["billions"],
    )  # fmt: skip


def _fields(name: str) -> dict[str, Any]:
    fields = json.loads(config_file(name).read_text("utf-8-sig"))
    text: dict[str, Any] = fields.get("text_config") or fields
    return text


def _from_file(config: ModelConfig, fields: dict[str, Any], dtype: str) -> Shape:
    if _first(fields, "kv_lora_rank"):
        raise ValueError(f"{config.name} caches latents, which tune does not measure")
    heads = _first(fields, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = _first(fields, "hidden_size", "n_embd", "d_model")
    head_dim = _first(fields, "head_dim") or (hidden or 0) // (heads or 1)
    if not heads or not head_dim:
        raise ValueError(f"{config.name} must have num_attention_heads and head_dim or hidden_size")
    kv_heads = config.token_elements // (2 * head_dim)
    shape = (heads, kv_heads, head_dim)
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{config.name}: {heads} heads do not divide into {kv_heads} KV heads")
    return Shape(config.name, config.layers, *shape, dtype, _parameters(fields, hidden, *shape))


def _first(fields: dict[str, Any], *names: str) -> int | None:
    """The first of these fields that is there and not 0.

    Raises:
        ValueError: it is no positive integer.
    """
    for name in names:
        value = fields.get(name)
        if value is None or value == 0:
            continue
        if type(value) is not int or value < 0:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r:.40}")
        return value
    return None


def _parameters(
    fields: dict[str, Any], hidden: int | None, heads: int, kv_heads: int, head_dim: int
) -> float | None:
    """Of a decoder with gated MLPs, all experts of all layers; an estimate."""
    inner = _first(fields, "intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
    layers = _first(fields, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if not (hidden and inner and layers):
        return None
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    sparse = _sparse_layers(fields, layers)
    dense_inner = _first(fields, "intermediate_size_mlp") or inner
    inner_sum = sparse * _expert_inner(fields, inner) + (layers - sparse) * dense_inner
    vocabulary = _first(fields, "vocab_size") or 0
    return float(layers * attention + 3 * hidden * inner_sum + hidden * vocabulary)


def _sparse_layers(fields: dict[str, Any], layers: int) -> int:
    """How many layers have experts, as Qwen, DeepSeek and Llama 4 say it."""
    if not _experts(fields):
        return 0
    dense = _first(fields, "first_k_dense_replace") or 0
    only_dense = fields.get("mlp_only_layers") or ()
    step = _first(fields, "decoder_sparse_step", "interleave_moe_layer_step") or 1
    numbers = range(dense, layers)
    return sum((n + 1) % step == 0 and n not in only_dense for n in numbers)


def _experts(fields: dict[str, Any]) -> int | None:
    return _first(fields, "num_experts", "num_local_experts", "n_routed_experts")


def _expert_inner(fields: dict[str, Any], inner: int) -> int:
    """Inner size of all experts of a layer together, with those that every token takes."""
    each = _first(fields, "moe_intermediate_size") or inner
    shared = _first(fields, "shared_expert_intermediate_size")
    if shared is None:
        llama_4 = "intermediate_size_mlp" in fields  # which does not say that it shares one
        shared = each * (_first(fields, "n_shared_experts") or int(llama_4))
    return each * (_experts(fields) or 0) + shared
