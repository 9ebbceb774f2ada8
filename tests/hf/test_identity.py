"""A patched model computes what it did before: same tokens, logits within 2e-4, no gathers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import FAMILIES, make_model, version
from transformers import PreTrainedModel
from ways import WAYS, Result

import pykvcache
from pykvcache.hf import counters

TOLERANCE = 2e-4


def assert_same(result: Result, expected: Result) -> None:
    """Equal tokens; floats equal where infinite and close elsewhere."""
    assert len(result.tokens) == len(expected.tokens)
    for got, wanted in zip(result.tokens, expected.tokens, strict=True):
        assert got.tolist() == wanted.tolist()
    assert len(result.floats) == len(expected.floats)
    for got, wanted in zip(result.floats, expected.floats, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def can(family: str, way: str) -> bool:
    """Whether the unpatched model generates in this way at all."""
    if way in ("assisted", "assisted_sampling", "prompt_lookup"):
        return family not in ("qwen3_next", "bamba")
    if family == "whisper":
        return way != "chunked_prefill"
    return True


def unpatched(model: PreTrainedModel, way: str) -> Result:
    """What the model does on its own. Before 5.23 a sliding window breaks HF's own drafts."""
    try:
        return WAYS[way](model)
    except RuntimeError as error:
        if version() >= (5, 23) or "assisted" not in way:
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot: {error}")


CASES = [(family, way) for family in FAMILIES for way in WAYS if can(family, way)]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_same_as_unpatched(family: str, way: str, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = unpatched(model, way)
    pykvcache.patch(model, block_size=4, backend=backend)
    counters.reset()
    assert_same(WAYS[way](model), expected)
    gathers = FAMILIES[family].gathers and (family != "t5" or version() >= (5, 23))
    assert (counters.gathered > 0) == gathers
    assert counters.paged > 0 or gathers


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("way", ["greedy", "beam_search", "assisted"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_any_block_size(family: str, way: str, block_size: int, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = unpatched(model, way)
    with pykvcache.patched(model, block_size=block_size, backend=backend):
        assert_same(WAYS[way](model), expected)
