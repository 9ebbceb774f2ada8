"""The code in README.md runs, and its short paged attention is the operator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import pykvcache
from pykvcache import ops

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = next(block for block in BLOCKS if "pykvcache.patch(" in block)
    assert len(example.strip().splitlines()) <= 18
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "blocks.png").stat().st_size > 0


def test_prefix_example_runs() -> None:
    example = next(block for block in BLOCKS if "prefix_cache=True" in block)
    exec(compile(example, "README.md", "exec"), {"pykvcache": pykvcache, "prompt": [*range(50)]})


def test_float8_example_runs() -> None:
    example = next(block for block in BLOCKS if "float8" in block)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    names = {
        "pykvcache": pykvcache,
        "model": transformers.LlamaForCausalLM(config).eval(),
        "ids": torch.arange(1, 20)[None],
        "bfloat16_block_bytes": 2 * 16 * (64 + 64) * 2,
    }
    exec(compile(example, "README.md", "exec"), names)
    assert names["tokens"].sequences.shape == (1, 27)


def test_short_paged_attention_is_the_operator() -> None:
    source = next(block for block in BLOCKS if block.startswith("def paged_attention"))
    namespace = {"torch": torch}
    exec(compile(source, "README.md", "exec"), namespace)
    torch.manual_seed(0)
    q = torch.randn(1 + 5 + 3, 6, 8)
    k_cache, v_cache = torch.randn(2, 12, 2, 4, 8)
    block_table = torch.tensor([[3, 1, 4, 11], [0, 5, -1, -1], [7, -1, -1, -1]], dtype=torch.int32)
    seq_lens = torch.tensor([14, 5, 4], dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    arguments = (q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
    out = namespace["paged_attention"](*arguments)
    expected, _ = ops.paged_attention(*arguments, 5, backend="reference")
    torch.testing.assert_close(out, expected)
