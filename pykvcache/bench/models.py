"""Small Llamas made from a config, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

SEED = 0


def build_llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A LlamaForCausalLM in eval mode that never stops early (it has no end-of-text token)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).to(dtype).eval()


def random_prompts(lengths: list[int], vocabulary: int, pad_token: int = 0) -> dict[str, Any]:
    """`input_ids` and `attention_mask` int64 [B, longest] of random tokens, padded on the left."""
    generator = torch.Generator().manual_seed(SEED)
    longest = max(lengths)
    ids = torch.randint(1, vocabulary, (len(lengths), longest), generator=generator)
    padding = torch.tensor([longest - length for length in lengths])[:, None]
    mask = (torch.arange(longest) >= padding).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad_token), "attention_mask": mask}
