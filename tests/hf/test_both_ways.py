"""Prompts that are seen in both directions: PaliGemma, and Gemma without `is_causal`.

Where the stock mask is left out, sdpa asks the attention module whether it is causal; where there
is one (padding, eager, a prompt in pieces), the mask decides. A patched model does the same.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, DEVICE, WINDOW, randomize
from test_identity import assert_same
from torch import Tensor
from transformers import PreTrainedModel
from ways import Result

import pykvcache

GEMMA = DECODER | {"head_dim": 8}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}
IMAGE, PATCHES = 90, 16


@functools.cache
def _make(family: str) -> PreTrainedModel:
    if family == "gemma":
        config = transformers.GemmaConfig(**GEMMA, use_bidirectional_attention=True)
        model: PreTrainedModel = transformers.GemmaForCausalLM(config)
    elif family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **GEMMA,
            use_bidirectional_attention=True,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
        model = transformers.Gemma3ForCausalLM(config)
    elif family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
        model.config.is_causal = False
    else:
        config = transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **GEMMA},
            vision_config=VISION,
            image_token_index=IMAGE,
            projection_dim=32,
        )
        model = transformers.PaliGemmaForConditionalGeneration(config)
    return randomize(model).eval()


def make(family: str, attention: str) -> PreTrainedModel:
    model = copy.deepcopy(_make(family))
    model.set_attn_implementation(attention)
    return model


def prompts(rows: int, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, IMAGE, (rows, 12), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: PreTrainedModel, **inputs: Any) -> Result:
    options: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    out = model.generate(**options | inputs, return_dict_in_generate=True, output_logits=True)
    return Result([out.sequences], list(out.logits))


WAYS: dict[str, dict[str, Any]] = {
    "no mask": {"input_ids": prompts(1)["input_ids"]},
    "one prompt": prompts(1),
    "batch": prompts(3),
    "padded": prompts(3, padded=True),
    "pieces": prompts(1) | {"prefill_chunk_size": 5},
    "padded pieces": prompts(2, padded=True) | {"prefill_chunk_size": 5},
    "beams": prompts(2) | {"num_beams": 3},
    "drafts": prompts(1) | {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gemma", "gemma3", "llama", "paligemma"])
@pytest.mark.parametrize("way", WAYS)
def test_same_as_unpatched(family: str, attention: str, way: str, backend: str) -> None:
    model = make(family, attention)
    expected = generate(model, **WAYS[way])
    pykvcache.patch(model, block_size=4, backend=backend)
    assert_same(generate(model, **WAYS[way]), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["one prompt", "padded", "suffix", "image"])
def test_token_types(attention: str, way: str, backend: str) -> None:
    """Of PaliGemma's processor: 0 in what is seen in both directions."""
    model = make("paligemma", attention)
    inputs = prompts(3, padded=way == "padded")
    types = torch.zeros_like(inputs["input_ids"])
    if way == "suffix":
        types[:, 8:] = 1
    if way == "image":
        images = torch.full((3, PATCHES), IMAGE).to(DEVICE)
        inputs = {name: torch.cat([images, x], 1) for name, x in inputs.items()}
        inputs["attention_mask"][:] = 1
        types = torch.zeros_like(inputs["input_ids"])
        noise = torch.Generator().manual_seed(0)
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=noise).to(DEVICE)
    inputs["token_type_ids"] = types
    expected = generate(model, **inputs)
    pykvcache.patch(model, block_size=4, backend=backend)
    assert_same(generate(model, **inputs), expected)


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_no_prefix_is_kept_where_keys_depend_on_what_follows(family: str, backend: str) -> None:
    model = make(family, "sdpa")
    padded, one = prompts(2, padded=True), prompts(2)["input_ids"][:1]
    longer = torch.cat([one, one], 1)
    wanted = [generate(model, **padded), *(generate(model, input_ids=x) for x in (one, longer))]
    pykvcache.patch(model, block_size=4, backend=backend, prefix_cache=True)
    for _ in range(2):
        assert_same(generate(model, **padded), wanted[0])
        assert_same(generate(model, input_ids=one), wanted[1])
        assert_same(generate(model, input_ids=longer), wanted[2])


def test_a_forward_may_ask_for_both_directions(backend: str) -> None:
    model = copy.deepcopy(_make("llama"))
    del model.config.is_causal
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        causal, expected = model(ids).logits, model(ids, is_causal=False).logits
        pykvcache.patch(model, block_size=4, backend=backend)
        result = model(ids, is_causal=False).logits
    assert not torch.allclose(causal, expected, atol=0.1)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-4)
