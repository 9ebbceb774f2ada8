"""Tiny random models of every family that the drop-in promises to leave unchanged.

Windows and chunks are shorter than what the tests generate, and weights are large enough for
attention to decide tokens, so that a wrong mask, block or position changes the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

WINDOW = 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 97
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """How to make a tiny model of one family, and what to expect of it."""

    config: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    gathers: bool = False  # its own code touches keys or values, so they are gathered
    eager: bool = False  # sdpa would ignore its softcap
    common: dict[str, Any] = field(default_factory=lambda: DECODER)


def version() -> tuple[int, int]:
    """Of transformers."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": 2.0,
        },
        eager=True,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", *ALTERNATING],
        },
    ),
    "cohere2": Family(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {"sliding_window": WINDOW, "layer_types": ALTERNATING, "logit_scale": 1.0},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
        },
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        common=TOKENS,
    ),
    "gpt_neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": Family("OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": Family(
        "MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": WINDOW}
    ),
    "granite": Family("GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.5}),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM"),
    "starcoder2": Family("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "stablelm": Family("StableLmConfig", "StableLmForCausalLM"),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": WINDOW,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ALTERNATING * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
    ),
    "falcon_rope": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        gathers=True,
    ),
    "falcon_alibi": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {"new_decoder_architecture": False, "multi_query": False, "alibi": True},
        gathers=True,
    ),
    "bloom": Family(
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        gathers=True,
        common=TOKENS,
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
        gathers=True,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "bamba": Family(
        "BambaConfig",
        "BambaForCausalLM",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_d_head": 8,
            "mamba_expand": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "diffllama": Family("DiffLlamaConfig", "DiffLlamaForCausalLM", gathers=True),
    "jetmoe": Family(
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        gathers=True,
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
        },
        gathers=version() < (5, 18),
        common=TOKENS,
    ),
    "bart": Family(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 256,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": None,
        },
        common=TOKENS,
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_mel_bins": 8,
            "max_source_positions": 12,
            "max_target_positions": 96,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        common=TOKENS,
    ),
}


@functools.cache
def make_model(name: str) -> transformers.PreTrainedModel:
    """The family's model in fp32, the same in every process; treat it as read-only."""
    family = FAMILIES[name]
    arguments = {**family.common, **family.arguments}
    config = getattr(transformers, family.config)(**arguments)
    if family.eager:
        config._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomize(getattr(transformers, family.model)(config))


def randomize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Weights that let attention decide, the same in every process; no end-of-text token."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                gain = 1.0 if id(parameter) in embeddings else 2.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = None
    model.generation_config.max_length = None
    return model.to(DEVICE)
