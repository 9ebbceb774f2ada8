"""How many bytes of keys and values a token of a model has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("configs.json")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
ALIASES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "head_dim": ("head_dim",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
}


@dataclass(frozen=True)
class ModelConfig:
    """What decides the size of a cache.

    token_elements: elements of K and V of one token in one layer. Layers with a sliding window
    count like the others, since a pool has a place for every token in every layer.
    """

    name: str
    layers: int
    token_elements: int
    dtype_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token slot."""
        return self.layers * self.token_elements * self.dtype_bytes


def known_configs() -> dict[str, dict[str, int]]:
    """The packaged table: name -> layers, kv_heads, head_dim or latent_dim, dtype_bytes."""
    table: dict[str, dict[str, int]] = json.loads(TABLE.read_text())
    return table


def load_config(name: str) -> ModelConfig:
    """A config of the packaged table, or of a Hugging Face config.json (or the folder it is in).

    Raises:
        ValueError: the name is unknown, or the file lacks what is needed.
    """
    table = known_configs()
    if name.lower() in table:
        row = table[name.lower()]
        elements = row.get("latent_dim") or 2 * row["kv_heads"] * row["head_dim"]
        return ModelConfig(name.lower(), row["layers"], elements, row["dtype_bytes"])
    path = config_file(name)
    if not path.is_file():
        raise ValueError(
            f"model config must be a config.json or one of {', '.join(table)}, got {name!r}"
        )
    try:
        fields = json.loads(path.read_text("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(fields).__name__}")
    text = fields.get("text_config") or fields
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config must be an object, got {text!r:.40}")
    return _from_fields(text, fields, path)


def config_file(name: str) -> Path:
    """The file that a name outside of the table means: itself, or config.json of a folder."""
    path = Path(name)
    return path / "config.json" if path.is_dir() else path


def _from_fields(fields: dict[str, Any], outer: dict[str, Any], path: Path) -> ModelConfig:
    def get(what: str, default: int | None = None) -> int:
        for name in ALIASES[what]:
            value = fields.get(name)
            if value is not None:
                if type(value) is not int or value <= 0:
                    raise ValueError(f"{path}: {name} must be a positive integer, got {value!r}")
                return value
        if default is None:
            raise ValueError(f"{path} has no {' or '.join(ALIASES[what])}")
        return default

    layers = get("num_hidden_layers")
    if fields.get("kv_lora_rank"):
        elements = get("kv_lora_rank") + get("qk_rope_head_dim")
    else:
        heads = get("num_attention_heads")
        head_dim = get("head_dim", 0) or get("hidden_size") // heads
        if not head_dim:
            raise ValueError(
                f"{path}: hidden_size must be at least num_attention_heads, got "
                f"{get('hidden_size')} and {heads}"
            )
        one = fields.get("multi_query", False) and not fields.get("new_decoder_architecture")
        kv_heads = get("num_key_value_heads", 1 if one else heads)
        if heads % kv_heads:
            raise ValueError(f"{path}: {heads} heads do not divide into {kv_heads} KV heads")
        elements = 2 * kv_heads * head_dim
    dtype = str(outer.get("dtype") or outer.get("torch_dtype") or "bfloat16")
    dtype = dtype.removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{path}: dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return ModelConfig(path.parent.name or path.name, layers, elements, DTYPE_BYTES[dtype])
