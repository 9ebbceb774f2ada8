"""kv_dtype="float8_e4m3fn": a model computes what it would with keys and values rounded to float8.

The oracle is the unpatched model, whose caches round what they are given: to float8 in units of
the largest of each head's vector over 448.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from families import FAMILIES, make_model
from test_identity import can
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from ways import WAYS, Result, greedy_tokens

import pykvcache
from pykvcache.hf import counters

FLOAT8 = "float8_e4m3fn"
TOLERANCE = 2e-3  # a number between two codes may be rounded to either


def rounded(x: Tensor) -> Tensor:
    """x [..., D] as it comes back from a cache."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


@contextmanager
def rounding_caches() -> Iterator[None]:
    """Caches of transformers hold rounded keys and values."""
    with pytest.MonkeyPatch.context() as patches:
        for kind in (DynamicLayer, DynamicSlidingWindowLayer):
            update = kind.update

            def update_rounded(
                self: Any, k: Tensor, v: Tensor, *args: Any, _update: Any = update, **kwargs: Any
            ) -> Any:
                return _update(self, rounded(k), rounded(v), *args, **kwargs)

            patches.setattr(kind, "update", update_rounded)
        yield


def assert_close(result: Result, expected: Result) -> None:
    assert [x.tolist() for x in result.tokens] == [x.tolist() for x in expected.tokens]
    for got, wanted in zip(result.floats, expected.floats, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


SOME = ("llama", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "bloom", "qwen3_next")
CASES = [
    *((family, "greedy") for family in FAMILIES if family not in ("t5", "whisper", "bart")),
    *((family, way) for family in SOME for way in WAYS if way != "greedy" and can(family, way)),
]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_same_as_rounded(family: str, way: str, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    if model.config.is_encoder_decoder:
        pytest.skip("what the decoder reads of the encoder is not paged, and not rounded")
    with rounding_caches():
        expected = WAYS[way](model)
    pykvcache.patch(model, block_size=4, kv_dtype=FLOAT8, backend=backend)
    counters.reset()
    assert_close(WAYS[way](model), expected)
    assert (counters.gathered > 0) == FAMILIES[family].gathers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(llama: PreTrainedModel, dtype: torch.dtype, backend: str) -> None:
    """Queries keep the model's dtype, and lose nothing but what 16 bits lose anyway."""
    model = llama.to(dtype)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    with rounding_caches():
        expected = greedy_tokens(model, **options).logits[0]
    pykvcache.patch(model, kv_dtype=FLOAT8, backend=backend)
    logits = greedy_tokens(model, **options).logits[0]
    assert logits.dtype == expected.dtype
    cosine = torch.nn.functional.cosine_similarity(logits.float(), expected.float())
    assert cosine.min() > (0.9999 if dtype == torch.float16 else 0.999)


def test_keys_that_are_read_are_near(llama: PreTrainedModel, backend: str) -> None:
    ids = torch.arange(3, 60)[None].to(llama.device)
    with torch.no_grad():
        expected = llama(ids, use_cache=True).past_key_values
        pykvcache.patch(llama, kv_dtype=FLOAT8, backend=backend)
        cache = llama(ids, use_cache=True).past_key_values
    for layer, stock in zip(cache.layers[:1], expected.layers, strict=False):
        for got, plain in ((layer.keys, stock.keys), (layer.values, stock.values)):
            torch.testing.assert_close(got, rounded(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_keys_and_values_of_two_dtypes(llama: PreTrainedModel, backend: str) -> None:
    """As autocast may leave them; not all backends take them as they are."""
    cache = pykvcache.PagedCache(llama.config, kv_dtype=FLOAT8, backend=backend)
    k, v = torch.randn(2, 1, 2, 5, 8).to(llama.device)
    keys, values = cache.update(k, v.bfloat16(), 0)
    torch.testing.assert_close(keys + 0, rounded(k), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values + 0, rounded(v.bfloat16().float()), rtol=1e-5, atol=1e-6)


def test_a_pool_of_equal_bytes_holds_more(llama: PreTrainedModel, backend: str) -> None:
    """Rows of 8 bytes have two scales of 4: half of float32. Rows of 128 have 97 % of 4 times."""
    sizes = {}
    for name in ("float32", "float16", FLOAT8):
        cache = pykvcache.PagedCache(llama.config, memory="1MiB", kv_dtype=name, backend=backend)
        with torch.no_grad():
            llama(torch.arange(3, 30)[None].to(llama.device), past_key_values=cache)
        stats = cache.stats()
        assert stats["pool_bytes"] <= 2**20
        assert stats["block_bytes"] * stats["num_blocks"] == stats["pool_bytes"]
        sizes[name] = stats["block_bytes"]
    tokens = 16 * llama.config.num_hidden_layers * 2 * llama.config.num_key_value_heads
    dim = llama.config.hidden_size // llama.config.num_attention_heads
    assert sizes == {
        "float32": 4 * dim * tokens, "float16": 2 * dim * tokens, FLOAT8: (dim + 4) * tokens
    }  # fmt: skip


STATIC_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {}, "beams": {"num_beams": 3}, "chunks": {"prefill_chunk_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("way", STATIC_WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "diffllama"])
def test_static_caches(family: str, way: str, backend: str) -> None:
    """In patched models, of which the last two read keys, and in others."""
    model, options = copy.deepcopy(make_model(family)), {"disable_compile": True}
    options |= STATIC_WAYS[way]

    def generate() -> Tensor:
        cache = pykvcache.PagedCache(
            model.config, static=True, max_length=64, block_size=4, kv_dtype=FLOAT8, backend=backend
        )
        return greedy_tokens(model, past_key_values=cache, **options)

    with rounding_caches():
        expected = greedy_tokens(model, **options)
    assert torch.equal(generate(), expected)
    pykvcache.patch(model, backend=backend)
    assert torch.equal(generate(), expected)


def test_static_cache_in_one_graph(llama: PreTrainedModel) -> None:
    with rounding_caches():
        expected = greedy_tokens(llama)
    pykvcache.patch(llama)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    cache = pykvcache.PagedCache(llama.config, static=True, max_length=64, kv_dtype=FLOAT8)
    tokens = greedy_tokens(llama, past_key_values=cache, compile_config=options)
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float32"])
def test_static_caches_of_another_dtype(family: str, kv_dtype: str, backend: str) -> None:
    """They lose what the dynamic ones lose, which themselves differ by the order of sums."""
    model = copy.deepcopy(make_model(family))
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    plain = greedy_tokens(model, **options).logits[0]
    pykvcache.patch(model, backend=backend, kv_dtype=kv_dtype)
    expected = greedy_tokens(model, **options).logits[0]
    cache = pykvcache.PagedCache(
        model.config, static=True, max_length=64, kv_dtype=kv_dtype, backend=backend
    )
    logits = greedy_tokens(model, past_key_values=cache, disable_compile=True, **options).logits[0]
    lost = float((expected - plain).abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=lost / 2 + 2e-5)


def test_other_float8_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"kv_dtype must be .*float8_e4m3fn, got 'float8_e5m2'"):
        pykvcache.patch(llama, kv_dtype="float8_e5m2")
