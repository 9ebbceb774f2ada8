"""Bad input: one readable line that names the argument and the numbers, and no harm done."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import DEVICE, VOCAB, make_model
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from ways import inputs_for

import pykvcache
from pykvcache import OutOfBlocks
from pykvcache.hf import PagedCache

BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block_size": 2**40}, ValueError, "block_size must be 1 to 65536, got 1099511627776"),
    ({"num_blocks": 2**60}, ValueError, "num_blocks must be 1 to 2147483647"),
    ({"prefix_cache": "no"}, TypeError, "prefix_cache must be a bool, got 'no'"),
    ({"prefix_cache": None}, TypeError, "prefix_cache must be a bool, got None"),
    ({"deterministic": "no"}, TypeError, "deterministic must be a bool, got 'no'"),
    ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    ({"block_size": 2.5}, TypeError, "block_size must be an int, got 2.5"),
    ({"num_blocks": -3}, ValueError, "num_blocks must be at least 1, got -3"),
    ({"memory": "lots"}, ValueError, "memory must look like '4GiB' or '512MB', got 'lots'"),
    ({"memory": 0}, ValueError, "memory must be at least 1, got 0"),
    ({"memory": 1.5}, TypeError, "memory must be bytes as an int or a string"),
    ({"num_blocks": 4, "memory": "1MB"}, ValueError, "num_blocks or memory, not both"),
    ({"kv_dtype": "int8"}, ValueError, "kv_dtype must be 'auto' or one of float32"),
    ({"kv_dtype": torch.float64}, ValueError, "kv_dtype must be 'auto' or one of float32"),
    ({"backend": "abacus"}, ValueError, "backend must be 'auto' or one of"),
]


def greedy(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Greedy tokens of the padded batch."""
    inputs = inputs_for(model)
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return tokens


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_bad_settings(
    llama: PreTrainedModel, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    expected = greedy(llama)
    with pytest.raises(error) as caught:
        pykvcache.patch(llama, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(greedy(llama), expected)


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        pykvcache.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["Mamba", "ViT"])
def test_model_without_paged_attention(name: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = small | ({"vocab_size": VOCAB, "state_size": 4} if name == "Mamba" else {})
    arguments |= {"intermediate_size": 16}
    config = getattr(transformers, f"{name}Config")(**arguments)
    model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match="no attention") as caught:
        pykvcache.patch(model)
    assert "\n" not in str(caught.value)


def test_pool_too_small(llama: PreTrainedModel) -> None:
    """More tokens than the pool holds: nothing is written, and smaller batches still fit."""
    expected = greedy(llama)
    pykvcache.patch(llama, block_size=4, num_blocks=9)
    with pytest.raises(OutOfBlocks) as caught:
        greedy(llama)
    assert "\n" not in str(caught.value)
    assert caught.value.total == 9
    one = inputs_for(llama, 1)
    tokens = llama.generate(**one, max_new_tokens=12, do_sample=False)
    assert torch.equal(tokens, expected[:1])
    pykvcache.unpatch(llama)
    pykvcache.patch(llama, block_size=4, num_blocks=30)
    assert torch.equal(greedy(llama), expected)


def test_full_pool_keeps_what_it_has(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache = PagedCache(llama.config, num_blocks=3, block_size=4)
    prompt = torch.arange(5, 15).to(DEVICE)[None]
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        kept = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(OutOfBlocks, match="3"):
            llama(torch.arange(20, 24).to(DEVICE)[None], past_key_values=cache)
        assert cache.get_seq_length() == 10
        for layer, keys in zip(cache.layers, kept, strict=True):
            assert torch.equal(layer.keys, keys)
        got = llama(torch.tensor([[20, 21]]).to(DEVICE), past_key_values=cache).logits
        wanted = llama(torch.cat([prompt, torch.tensor([[20, 21]]).to(DEVICE)], 1)).logits[:, -2:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)


def test_memory_below_one_block(llama: PreTrainedModel) -> None:
    expected = greedy(llama)
    pykvcache.patch(llama, memory="1KB")
    with pytest.raises(ValueError, match="memory must hold at least one block of 4096 bytes, got"):
        greedy(llama)
    pykvcache.unpatch(llama)
    assert torch.equal(greedy(llama), expected)


def test_memory_fixes_the_pool(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, memory="64KiB")
    cache = greedy(llama, return_dict_in_generate=True).past_key_values
    assert cache.stats()["num_blocks"] == 16
    assert cache.stats()["pool_bytes"] == 64 * 1024


def test_wrong_batch(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache = PagedCache(llama.config)
    with torch.no_grad():
        llama(torch.ones(2, 3, dtype=torch.long).to(DEVICE), past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds 2 rows but keys have 3"):
            llama(torch.ones(3, 1, dtype=torch.long).to(DEVICE), past_key_values=cache)
        assert cache.get_seq_length() == 3
        llama(torch.ones(2, 1, dtype=torch.long).to(DEVICE), past_key_values=cache)


def test_wrong_dtype_and_shape(llama: PreTrainedModel) -> None:
    cache = PagedCache(llama.config)
    k = torch.randn(1, 2, 3, 8).to(DEVICE)
    with pytest.raises(TypeError, match="keys must be one of float32, float16, bfloat16, got"):
        cache.update(k.double(), k.double(), 0)
    with pytest.raises(ValueError, match="k has 2 heads but v has 1"):
        cache.update(k, k[:, :1], 0)
    with torch.no_grad():
        cache.update(k, k, 0)
        cache.update(k, k, 1)
    with pytest.raises(ValueError, match="every layer must be updated in every forward"):
        cache.update(k, k, 0)
        cache.update(k[:, :, :2], k[:, :, :2], 1)


def test_crop_beyond_a_window() -> None:
    model = copy.deepcopy(make_model("mistral"))
    cache = PagedCache(model.config)
    with torch.no_grad():
        model(torch.ones(1, 12, dtype=torch.long).to(DEVICE), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("max_length", "error", "message"),
    [
        ("5", TypeError, "max_length must be an int, got '5'"),
        (2.5, TypeError, "max_length must be an int, got 2.5"),
        (True, TypeError, "max_length must be an int, got True"),
        (-5, ValueError, "max_length must be at least 1, got -5"),
    ],
)
def test_bad_lengths(static: bool, max_length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        PagedCache(make_model("llama").config, max_length=max_length, static=static)
    assert str(caught.value) == message


@pytest.mark.parametrize("static", [False, True])
def test_not_a_config(static: bool) -> None:
    model = make_model("llama")
    message = "config must be a transformers PreTrainedConfig, got "
    for wrong, given in (
        (model, "LlamaForCausalLM, pass its .config"),
        ("gpt2", "str"),
        (model.config.to_dict(), "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError) as caught:
            PagedCache(wrong, max_length=8, static=static)
        assert str(caught.value) == message + given


def test_lengths_of_numpy(llama: PreTrainedModel) -> None:
    expected = greedy(llama)
    pykvcache.patch(llama)
    inputs = inputs_for(llama)
    tokens = llama.generate(**inputs, max_new_tokens=np.int64(12), do_sample=False)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("tokens", [3, 10])
def test_crop_to_a_length_does_what_transformers_does(tokens: int) -> None:
    """5.17 kept so many tokens, and all where there were fewer; later versions refuse it."""
    caches = DynamicCache(), PagedCache(make_model("llama").config)
    found = []
    for cache in caches:
        for layer in range(2):
            cache.update(*torch.ones(2, 1, 2, 5, 8).to(DEVICE), layer)
        try:
            cache.crop(tokens)
        except ValueError as error:
            assert "\n" not in str(error)
            found.append(("refused", cache.get_seq_length()))
        else:
            found.append(("cropped", cache.get_seq_length()))
    assert found[0] == found[1]


def test_caches_cannot_be_saved(llama: PreTrainedModel) -> None:
    cache = PagedCache(llama.config)
    cache.update(*torch.ones(2, 1, 2, 5, 8).to(DEVICE), 0)
    for save in (pickle.dumps, lambda value: torch.save(value, io.BytesIO())):
        with pytest.raises(TypeError, match=r"pickled nor saved.*copy.deepcopy") as caught:
            save(cache)
        assert "\n" not in str(caught.value)
    assert copy.deepcopy(cache).get_seq_length() == 5
