"""torch.compile: the user's own compile of a patched model, and the static cache in one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from families import make_model
from transformers import CompileConfig, PreTrainedModel
from ways import NEW_TOKENS, PROMPT, inputs_for

import pykvcache
from pykvcache import OutOfBlocks
from pykvcache.hf import PagedCache

LENGTH = PROMPT + NEW_TOKENS


def greedy(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Greedy tokens of the padded batch."""
    tokens: torch.Tensor = model.generate(
        **inputs_for(model), max_new_tokens=NEW_TOKENS, do_sample=False, **options
    )
    return tokens


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "mistral", "gemma2", "gpt_oss"])
def test_static_cache(family: str) -> None:
    """Eager first: the same tokens, also with beams and twice on one cache."""
    model = copy.deepcopy(make_model(family))
    expected, beams = greedy(model), greedy(model, num_beams=3)
    pykvcache.patch(model)
    cache = PagedCache(model.config, block_size=4, max_length=LENGTH, static=True)
    assert torch.equal(greedy(model, past_key_values=cache), expected)
    cache.reset()
    assert torch.equal(greedy(model, past_key_values=cache), expected)
    cache = PagedCache(model.config, block_size=4, max_length=LENGTH, static=True)
    assert torch.equal(greedy(model, past_key_values=cache, num_beams=3), beams)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_static_generate_is_one_graph(family: str, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = greedy(model)
    pykvcache.patch(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = CompileConfig(fullgraph=True, backend=backend, mode=None)
    options._compile_all_devices = True
    for _ in range(2):
        cache = PagedCache(model.config, block_size=4, max_length=LENGTH, static=True)
        tokens = greedy(model, past_key_values=cache, compile_config=options)
        assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_model(family: str) -> None:
    """The dynamic cache stays outside the graphs."""
    model = copy.deepcopy(make_model(family))
    expected = greedy(model)
    pykvcache.patch(model, block_size=4)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(greedy(model), expected)
    torch._dynamo.reset()


def test_static_arguments() -> None:
    model = copy.deepcopy(make_model("llama"))
    with pytest.raises(ValueError, match="static=True needs max_length"):
        PagedCache(model.config, static=True)
    with pytest.raises(ValueError, match="static=True does not take memory"):
        PagedCache(model.config, static=True, max_length=9, memory="1GB")
    pykvcache.patch(model)
    cache = PagedCache(model.config, num_blocks=5, block_size=4, static=True, max_length=LENGTH)
    with pytest.raises(OutOfBlocks, match="3 rows of 27 tokens need 21 blocks, the pool has 5"):
        greedy(model, past_key_values=cache)


def test_static_cache_in_a_model_that_is_not_patched() -> None:
    model = make_model("llama")
    inputs = inputs_for(model)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    cache = PagedCache(model.config, block_size=4, max_length=LENGTH, static=True)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, expected)


def test_static_cache_that_is_full_changes_nothing() -> None:
    model = pykvcache.patch(copy.deepcopy(make_model("llama")))
    cache = PagedCache(model.config, block_size=4, max_length=12, static=True)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        with pytest.raises(ValueError, match="max_length is 12 but a row would have 20 tokens"):
            model(ids, past_key_values=cache)
        expected = model(ids[:, :8]).logits
        logits = model(ids[:, :8], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected)
