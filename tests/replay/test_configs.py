"""Model configs, packaged and of the user, and the bytes of a token in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench.replay.cases import POLICIES
from pykvcache.bench.replay.configs import known_configs, load_config


def test_configs_are_whole_and_known_sizes_come_out() -> None:
    for name in known_configs():
        assert load_config(name).token_bytes > 0
    assert load_config("llama-3.1-8b").token_bytes == 128 * 1024
    assert load_config("opt-13b").token_bytes == 800 * 1024
    assert load_config("deepseek-v3").token_bytes == 61 * 576 * 2
    assert POLICIES[-1] == "paged"


def test_config_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"n_layer": 3, "n_head": 4, "n_embd": 32}', "utf-8")
    assert load_config(str(path)).token_bytes == 3 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "hidden_size": 64,
                "num_key_value_heads": 2,
            },
            2 * 2 * 2 * 8 * 2,
        ),
        ({"n_layer": 3, "n_head": 4, "n_embd": 32, "torch_dtype": "float32"}, 3 * 2 * 32 * 4),
        (
            {
                "text_config": {
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "head_dim": 16,
                    "num_key_value_heads": 1,
                }
            },
            2 * 16 * 2,
        ),
        ({"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 576 * 2),
    ],
)
def test_config_files(tmp_path: Path, fields: dict, expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(str(tmp_path)).token_bytes == expected
    assert load_config(str(tmp_path / "config.json")).token_bytes == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ('{"num_hidden_layers": 2}', "num_attention_heads"),
        ('{"num_hidden_layers": "two"}', "positive integer"),
        (
            '{"n_layer": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "dtype": "int3"}',
            "dtype",
        ),
        ('{"num_hidden_layers": 1, "kv_lora_rank": 8}', "qk_rope_head_dim"),
        (
            '{"n_layer": 1, "n_head": 8, "num_key_value_heads": 3, "head_dim": 4}',
            "8 heads do not divide into 3 KV heads",
        ),
    ],
)
def test_bad_config_files(run, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = run("--model-config", str(path))
    assert code == 2 and words in err and err.count("\n") == 1
