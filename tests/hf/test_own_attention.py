"""Models that read keys and values by themselves, or put tokens of their own before the prompt.

Such a model need not mask padding, and its mask need not have a column for every position.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from families import DEVICE, VISION, make_model, randomize
from test_identity import assert_same
from torch import Tensor
from transformers import PreTrainedModel
from ways import WAYS, inputs_for

import pykvcache
from pykvcache import OutOfBlocks
from pykvcache.hf import PagedCache, counters

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "git": (
        "GitConfig",
        "GitForCausalLM",
        {"vision_config": VISION, "num_hidden_layers": 2, "intermediate_size": 48},
    ),
    "cpmant": (
        "CpmAntConfig",
        "CpmAntForCausalLM",
        {"dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2, "prompt_length": 8},
    ),
    "prophetnet": (
        "ProphetNetConfig",
        "ProphetNetForCausalLM",
        {
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "is_decoder": True,
            "is_encoder_decoder": False,
            "max_position_embeddings": 64,
        },
    ),
}
CHOICES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
]


@functools.cache
def own(name: str) -> PreTrainedModel:
    """A tiny random model; treat it as read-only."""
    config, model, arguments = MODELS[name]
    torch.manual_seed(0)
    return randomize(
        getattr(transformers, model)(getattr(transformers, config)(**SMALL | arguments))
    )


def generate(model: PreTrainedModel, image: bool = False, **options: Any) -> Tensor:
    """Tokens for a batch padded on the left."""
    inputs = inputs_for(model)
    if image:
        generator = torch.Generator().manual_seed(8)
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator).to(DEVICE)
    torch.manual_seed(3)
    tokens: Tensor = model.generate(
        **inputs, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options
    )
    return tokens


@pytest.mark.parametrize("options", CHOICES, ids=["greedy", "beams", "samples"])
@pytest.mark.parametrize(
    ("name", "image"), [("git", True), ("git", False), ("cpmant", False), ("prophetnet", False)]
)
def test_left_padding(name: str, image: bool, options: dict[str, Any], backend: str) -> None:
    model = copy.deepcopy(own(name))
    expected = generate(model, image, **options)
    pykvcache.patch(model, block_size=4, backend=backend)
    counters.reset()
    assert torch.equal(generate(model, image, **options), expected)
    assert counters.gathered > 0


@pytest.mark.parametrize("way", ["logits", "chunked_prefill", "continued", "branched"])
def test_padding_that_is_read_is_stored(way: str, backend: str) -> None:
    """Also in chunks that are all padding, in caches that go on and in copies of them."""
    model = copy.deepcopy(own("git"))
    expected = WAYS[way](model)
    pykvcache.patch(model, block_size=4, backend=backend)
    assert_same(WAYS[way](model), expected)


def test_prefixes_do_not_bring_padding() -> None:
    """Blocks found again hold none, so a padded batch computes its prompts."""
    model = copy.deepcopy(own("git"))
    inputs = inputs_for(model)
    ids = inputs["input_ids"][1:2, 3:]
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    short = model.generate(ids, **options)
    padded = torch.nn.functional.pad(short, (4, 0))
    mask = (torch.arange(padded.shape[1]).to(DEVICE) >= 4).long()[None]
    expected = model.generate(padded, attention_mask=mask, **options)
    pykvcache.patch(model, block_size=4, prefix_cache=True)
    assert torch.equal(model.generate(ids, **options), short)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options), expected)


def test_padding_of_other_models_is_not_stored() -> None:
    model = copy.deepcopy(make_model("llama"))
    real = int(inputs_for(model)["attention_mask"].sum())
    pykvcache.patch(model, block_size=1)
    with torch.no_grad():
        cache = model(**inputs_for(model), use_cache=True).past_key_values
    assert cache.stats()["used_blocks"] == real


def test_pool_too_small_for_padding() -> None:
    """33 positions with their padding, 23 without."""
    model = pykvcache.patch(copy.deepcopy(own("prophetnet")))
    inputs = inputs_for(model)
    cache = PagedCache(model.config, num_blocks=30, block_size=1)
    with torch.no_grad():
        with pytest.raises(OutOfBlocks):
            model(**inputs, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 0
        assert cache.stats()["used_blocks"] == 0
        ids = inputs["input_ids"][:1]
        got = model(ids, past_key_values=cache, use_cache=True).logits
    pykvcache.unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=2e-4)


def test_mask_of_another_width_is_not_padding_of_the_rows() -> None:
    """A mask of 4 columns says nothing about a forward of 6 positions."""
    cache = PagedCache(make_model("llama").config, block_size=1)
    cache.announce(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).to(DEVICE))
    k = torch.randn(2, 2, 6, 8).to(DEVICE)
    cache.update(k, k, 0)
    assert not cache.rows.announced
    assert cache.stats()["used_blocks"] == 12
    assert torch.equal(cache.layers[0].keys, k)
