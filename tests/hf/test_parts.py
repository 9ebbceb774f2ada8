"""Which parts of a model are patched, and models that share configs with each other."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers
from families import DEVICE, FAMILIES, VISION, make_model, randomize
from transformers import PreTrainedModel

import pykvcache
from pykvcache.hf import PagedCache, counters

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
Inputs = dict[str, Any]


def prompts() -> Inputs:
    """Two prompts, the second padded on the left."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def images() -> Inputs:
    """Two of them."""
    generator = torch.Generator().manual_seed(8)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).to(DEVICE)}


def blip() -> tuple[PreTrainedModel, Inputs]:
    """Its `generate` calls that of its text decoder."""
    text = TEXT | {"encoder_hidden_size": 32, "sep_token_id": 2, "max_position_embeddings": 64}
    config = transformers.BlipConfig(
        vision_config=VISION, text_config=text | {"projection_dim": 32}
    )
    return transformers.BlipForConditionalGeneration(config), images()


def blip2() -> tuple[PreTrainedModel, Inputs]:
    """Its `generate` calls that of a language model."""
    former = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "num_attention_heads")}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=former | {"num_hidden_layers": 1, "encoder_hidden_size": 32},
        text_config=TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_token_index=95,
    )
    inputs = prompts()
    ids = torch.cat([torch.full((2, 4), 95).to(DEVICE), inputs["input_ids"].clamp(min=3)], 1)
    return transformers.Blip2ForConditionalGeneration(config), {"input_ids": ids, **images()}


def berts() -> tuple[PreTrainedModel, Inputs]:
    """The decoder is a model that could generate by itself."""
    decoder = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=transformers.BertModel(transformers.BertConfig(**TEXT)),
        decoder=transformers.BertLMHeadModel(decoder),
    )
    return model, prompts() | {"decoder_start_token_id": 1}


def captions() -> tuple[PreTrainedModel, Inputs]:
    """A decoder after a vision model."""
    decoder = transformers.GPT2Config(**GPT2, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(transformers.ViTConfig(**VISION)),
        decoder=transformers.GPT2LMHeadModel(decoder),
    )
    return model, images() | {"decoder_start_token_id": 1}


def generate(model: PreTrainedModel, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Greedy tokens."""
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return tokens


def implementations(model: PreTrainedModel) -> list[str]:
    """Of the configs of all parts."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part.config._attn_implementation for part in parts]


def attributes(model: PreTrainedModel) -> list[list[str]]:
    """Names of what each part has in itself, and how many hooks."""
    return [
        [*sorted(part.__dict__), str(len(part._forward_pre_hooks) + len(part._forward_hooks))]
        for part in model.modules()
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [blip, blip2, berts, captions])
def test_inner_models_are_paged(make: Any, beams: int) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    randomize(model)
    for part in model.modules():
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.eos_token_id, part.generation_config.pad_token_id = None, 0
    expected = generate(model, inputs, num_beams=beams)
    before = attributes(model), implementations(model)
    assert pykvcache.patch(model, block_size=4) is model
    assert pykvcache.patch(model, block_size=4) is model
    counters.reset()
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)
    if make is blip:  # its own code touches keys and values
        assert counters.gathered > 0
    else:
        assert counters.paged > 0
        assert counters.gathered == 0
    twin = copy.deepcopy(model)
    pykvcache.unpatch(model)
    assert (attributes(model), implementations(model)) == before
    counters.reset()
    assert torch.equal(generate(model, inputs, num_beams=beams), expected)
    assert counters.paged == counters.gathered == 0
    assert torch.equal(generate(twin, inputs, num_beams=beams), expected)
    assert counters.paged + counters.gathered > 0


def test_inner_model_that_is_patched_otherwise() -> None:
    model, _ = blip2()
    inner = model.language_model
    pykvcache.patch(inner, block_size=8)
    with pytest.raises(ValueError, match="patched with other settings"):
        pykvcache.patch(model, block_size=4)
    pykvcache.patch(model, block_size=8)
    pykvcache.unpatch(model)
    assert inner.config._attn_implementation == "pykvcache"  # it was patched for itself
    pykvcache.unpatch(inner)
    assert set(implementations(model)) == {"sdpa"}


@pytest.mark.parametrize("name", ["Rwkv", "XLNet", "OpenAIGPT", "Mamba", "Bert", "MiniMax"])
def test_models_without_a_cache(name: str) -> None:
    arguments = {
        "Rwkv": {"attention_hidden_size": 32},
        "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "OpenAIGPT": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "Mamba": {"state_size": 4},
        "Bert": {},
        "MiniMax": {"layer_types": ["full_attention", "linear_attention"], "head_dim": 8},
    }[name]
    config = getattr(transformers, f"{name}Config")(**{**TEXT, **arguments})
    ending = "ForCausalLM" if name in ("Rwkv", "Mamba", "MiniMax") else "LMHeadModel"
    model = getattr(transformers, name + ending)(config)
    before = attributes(model), implementations(model)
    with pytest.raises(ValueError, match=f"{name}.* has no attention with a key-value") as caught:
        pykvcache.patch(model)
    assert "\n" not in str(caught.value)
    assert (attributes(model), implementations(model)) == before


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_two_models_of_one_config(name: str, first: int) -> None:
    config = copy.deepcopy(make_model(name).config)
    before = config._attn_implementation
    assert before == ("eager" if FAMILIES[name].eager else "sdpa")
    models = [randomize(getattr(transformers, FAMILIES[name].model)(config)) for _ in range(2)]
    expected = [generate(model, prompts()) for model in models]

    def check(model: PreTrainedModel, tokens: torch.Tensor, patched: bool) -> None:
        counters.reset()
        assert torch.equal(generate(model, prompts()), tokens)
        assert (counters.paged > 0) == patched
        assert counters.gathered == 0

    for model in models:
        pykvcache.patch(model)
    for model, tokens in zip(models, expected, strict=True):
        check(model, tokens, True)
    pykvcache.unpatch(models[first])
    check(models[first], expected[first], False)
    check(models[1 - first], expected[1 - first], True)
    pykvcache.patch(models[first])
    pykvcache.unpatch(models[1 - first])
    check(models[first], expected[first], True)
    pykvcache.unpatch(models[first])
    assert config._attn_implementation == before
    for model, tokens in zip(models, expected, strict=True):
        check(model, tokens, False)


def test_models_that_share_a_config_in_any_order() -> None:
    config = copy.deepcopy(make_model("llama").config)
    models = [transformers.LlamaForCausalLM(config) for _ in range(3)]
    for order in itertools.permutations(models):
        for model in models:
            pykvcache.patch(model)
        for model in order:
            assert config._attn_implementation == "pykvcache"
            pykvcache.unpatch(model)
        assert config._attn_implementation == "sdpa"


def test_refused_patch_leaves_a_shared_config() -> None:
    config = copy.deepcopy(make_model("llama").config)
    first, second = (transformers.LlamaForCausalLM(config) for _ in range(2))
    pykvcache.patch(first)
    with pytest.raises(ValueError, match="block_size"):
        pykvcache.patch(second, block_size=0)
    assert config._attn_implementation == "pykvcache"
    pykvcache.unpatch(first)
    assert config._attn_implementation == "sdpa"


def test_model_that_went_away_patched() -> None:
    config = copy.deepcopy(make_model("llama").config)
    model = pykvcache.patch(transformers.LlamaForCausalLM(config))
    other = pykvcache.patch(transformers.LlamaForCausalLM(config))
    del model
    pykvcache.unpatch(other)
    with torch.no_grad():
        out = other(torch.ones(1, 3, dtype=torch.long))
    assert not isinstance(out.past_key_values, PagedCache)
