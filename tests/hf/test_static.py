"""The static cache in models whose own code touches keys or values, and when it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from families import DEVICE, make_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig, PreTrainedModel
from ways import NEW_TOKENS, PROMPT, inputs_for

import pykvcache
from pykvcache.hf import PagedCache, counters

LENGTH = 2 * PROMPT + NEW_TOKENS
TOUCHING = ["deepseek_v3", "diffllama", "jetmoe", "falcon_rope"]
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 4},
}


def static(model: PreTrainedModel) -> PagedCache:
    """An empty static cache."""
    return PagedCache(model.config, block_size=4, max_length=LENGTH, static=True)


def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    """Tokens for the padded batch."""
    torch.manual_seed(3)
    plain = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True}
    tokens: Tensor = model.generate(**inputs_for(model), **plain | options)
    return tokens


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", TOUCHING)
def test_models_that_touch_keys_or_values(family: str, choice: str, backend: str) -> None:
    model, options = copy.deepcopy(make_model(family)), CHOICES[choice]
    expected = generate(model, **options)
    pykvcache.patch(model, backend=backend)
    assert torch.equal(generate(model, **options, past_key_values=static(model)), expected)


@pytest.mark.parametrize("side", ["key", "value", "both"])
def test_transformed_keys_or_values_are_used(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the other one of the two still carries its layer."""
    model = copy.deepcopy(make_model("llama"))
    module = __import__(type(model).__module__, fromlist=["ALL_ATTENTION_FUNCTIONS"])
    interface = module.ALL_ATTENTION_FUNCTIONS.get_interface

    def transforming(*args: Any) -> Any:
        attention = interface(*args)

        def attend(owner: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **kw: Any):
            key = key.roll(1, -1) if side != "value" else key
            value = value.roll(1, -1) if side != "key" else value
            return attention(owner, query, key, value, *more, **kw)

        return attend

    monkeypatch.setattr(module.ALL_ATTENTION_FUNCTIONS, "get_interface", transforming)
    expected = generate(model)
    pykvcache.patch(model)
    counters.reset()
    assert torch.equal(generate(model, past_key_values=static(model)), expected)
    assert counters.gathered > 0


def test_nothing_is_gathered_for_other_models() -> None:
    model = pykvcache.patch(copy.deepcopy(make_model("llama")))
    counters.reset()
    generate(model, past_key_values=static(model))
    assert counters.gathered == 0


@pytest.mark.parametrize("family", ["diffllama", "jetmoe"])
def test_touching_models_in_one_graph(family: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = generate(model)
    pykvcache.patch(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    compiled = {"disable_compile": False, "compile_config": options}
    assert torch.equal(generate(model, past_key_values=static(model), **compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("family", "copies"), [("llama", False), ("diffllama", True)])
def test_a_graph_has_dense_keys_only_if_they_are_read(family: str, copies: bool) -> None:
    model = pykvcache.patch(copy.deepcopy(make_model(family)))
    shapes: list[tuple[int, ...]] = []

    def noting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        values = [node.meta.get("val") for node in graph.graph.nodes]
        shapes.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))
        return graph

    torch._dynamo.reset()
    forward = torch.compile(model.forward, backend=aot_autograd(fw_compiler=noting), fullgraph=True)
    cache, ids = static(model), torch.arange(3, 13).to(DEVICE)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        forward(input_ids=ids[:, :1], past_key_values=cache)
    torch._dynamo.reset()
    config = model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert shapes
    assert ((1, heads, LENGTH, dim) in shapes) == copies


def test_attention_weights() -> None:
    model = copy.deepcopy(make_model("gemma2"))
    ids = torch.arange(3, 13).to(DEVICE)[None]
    with torch.no_grad():
        expected = model(ids, output_attentions=True)
        pykvcache.patch(model)
        got = model(ids, output_attentions=True, past_key_values=static(model))
    for weights, wanted in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights[..., : ids.shape[1]], wanted)


@pytest.mark.parametrize("patched", [True, False])
def test_wrong_batch_changes_nothing(patched: bool) -> None:
    model = copy.deepcopy(make_model("llama"))
    if patched:
        pykvcache.patch(model)
    cache, ids = static(model), torch.arange(3, 13).to(DEVICE).repeat(3, 1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="the cache holds 3 rows but keys have 1"):
            model(ids[:1, :4], past_key_values=cache)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [10, 10]
        got = model(ids[:, :1], past_key_values=cache).logits
        wanted = model(ids[:, :1], past_key_values=twin).logits
    assert torch.equal(got, wanted)


def test_wrong_shape_changes_nothing() -> None:
    cache = static(make_model("llama"))
    k = torch.randn(2, 2, 3, 8).to(DEVICE)
    for layer in (0, 1):
        cache.update(k, k, layer)
    keys, _ = copy.deepcopy(cache).update(k[:, :, :1], k[:, :, :1], 0)
    for bad_k, bad_v in [(k, k[:, :1]), (k[:, :1], k[:, :1]), (k, k[:, :, :2]), (k.double(), k)]:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            cache.update(bad_k, bad_v, 0)
        assert "seq_lens" not in str(caught.value)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [3, 3]
    assert torch.equal(cache.update(k[:, :, :1], k[:, :, :1], 0)[0], keys)


def test_an_empty_cache_takes_another_batch() -> None:
    model = pykvcache.patch(copy.deepcopy(make_model("llama")))
    cache, ids = static(model), torch.arange(3, 13).to(DEVICE).repeat(3, 1)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:2], past_key_values=cache)
        cache.reset()
        got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
