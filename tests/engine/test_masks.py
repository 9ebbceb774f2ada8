"""The packed attention is causal, within a window at most: a model that wants more is refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, DEVICE, VOCAB, make_model, randomize
from torch import nn
from transformers import PreTrainedModel
from workload import one_by_one, random_prompt

import pykvcache

GEMMA = {"head_dim": 8, "use_bidirectional_attention": True}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def gemma() -> PreTrainedModel:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, **GEMMA))


def gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(**DECODER, **GEMMA, query_pre_attn_scalar=8)
    return transformers.Gemma3ForCausalLM(config)


def paligemma() -> PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **DECODER},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        image_token_index=90,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def bert() -> PreTrainedModel:
    return transformers.BertLMHeadModel(transformers.BertConfig(**DECODER, is_decoder=False))


def roc_bert() -> PreTrainedModel:
    config = transformers.RoCBertConfig(**DECODER, is_decoder=False)
    return transformers.RoCBertForCausalLM(config)


def llama() -> PreTrainedModel:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    model.config.is_causal = False
    return model


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # so small, no logits tell the directions apart
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gemma, gemma3, paligemma, bert, roc_bert, llama])
def test_tokens_that_see_later_ones_are_refused(make: Any, attention: str, scale: float) -> None:
    model = randomize(make()).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "attention" in name:
                parameter *= scale
    with pytest.raises(ValueError, match=r"cannot be packed: layer 0 .*lets tokens see later") as e:
        pykvcache.Engine(model, num_blocks=20)
    assert str(e.value).startswith(type(model).__name__)
    assert "\n" not in str(e.value)


def test_a_mask_that_a_model_makes_itself_is_refused() -> None:
    """Doge computes one from its values."""
    model = randomize(transformers.DogeForCausalLM(transformers.DogeConfig(**DECODER))).eval()
    with pytest.raises(ValueError) as error:
        pykvcache.Engine(model, num_blocks=20)
    assert str(error.value) == (
        "DogeForCausalLM cannot be packed: layer 0 (DogeAttention) makes an attention mask of its "
        "own"
    )


def adds(module: nn.Module, extra: Any) -> None:
    """Let a module's forward be given more."""
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | extra(kwargs)), with_kwargs=True
    )


EXTRAS: dict[str, tuple[Any, str]] = {
    "mask": (
        lambda kwargs: {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)},
        "makes an attention mask of its own",
    ),
    "bias": (
        lambda kwargs: {"position_bias": torch.ones(1, 1, 1, 1, device=DEVICE)},
        "adds a position bias",
    ),
    "both ways": (lambda kwargs: {"is_causal": False}, "lets tokens see later ones"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_nothing_that_attention_is_given_is_dropped(extra: str) -> None:
    """Also what begins only after the model was accepted."""
    change, reason = EXTRAS[extra]
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=50)
    wanted, prompt = one_by_one(model, random_prompt(9, 1)), random_prompt(9, 1)
    adds(model.model.layers[1].self_attn, change)
    message = f"LlamaForCausalLM cannot be packed: layer 1 (LlamaAttention) {reason}"
    for call in (lambda: pykvcache.Engine(model, num_blocks=50), lambda: engine.generate([prompt])):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    model.model.layers[1].self_attn._forward_pre_hooks.clear()
    assert engine.generate([prompt], max_new_tokens=len(wanted))[0].token_ids == wanted


def test_windows_are_compared_with_masks_whatever_the_attention() -> None:
    """Moshi's cache forgets what its masks show, also where the model uses flex attention."""
    config = transformers.MoshiConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    model = randomize(transformers.MoshiForCausalLM(config)).eval()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="layer 0 caches a window of 16 tokens, but its mask"):
        pykvcache.Engine(model, num_blocks=20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_patched_model_generates_while_an_engine_is_in_its_forward(
    family: str, attention: str
) -> None:
    model = copy.deepcopy(make_model(family))
    model.set_attn_implementation(attention)
    prompt = random_prompt(9, 1)
    wanted = one_by_one(model, prompt)
    pykvcache.patch(model, block_size=4)
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    inside, over = threading.Event(), threading.Event()

    def wait_inside(*args: Any) -> None:
        if threading.current_thread() is thread and not inside.is_set():
            inside.set()
            over.wait(60)

    outputs: list[Any] = []
    thread = threading.Thread(
        target=lambda: outputs.extend(engine.generate([prompt], max_new_tokens=len(wanted)))
    )
    hook = model.model.layers[0].register_forward_hook(wait_inside)
    thread.start()
    try:
        assert inside.wait(60)
        assert one_by_one(model, prompt) == wanted
        cache = pykvcache.PagedCache(model.config, max_length=64, static=True)
        out = model.generate(
            torch.tensor([prompt], device=DEVICE), past_key_values=cache, max_new_tokens=len(wanted)
        )
        assert out[0, len(prompt) :].tolist() == wanted
    finally:
        over.set()
        thread.join()
        hook.remove()
    assert outputs[0].token_ids == wanted
    assert model.config._attn_implementation.startswith("pykvcache")
    assert one_by_one(model, prompt) == wanted
