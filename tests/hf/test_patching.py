"""What `patch` leaves alone, what it puts back, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DEVICE
from transformers import DynamicCache, PreTrainedModel
from ways import greedy_tokens, inputs_for

import pykvcache
from pykvcache.hf import PagedCache, counters


def test_import_is_light() -> None:
    code = (
        "import sys, pykvcache; print([m for m in ('transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unpatch_restores_everything(llama: PreTrainedModel) -> None:
    def picture() -> tuple[Any, ...]:
        attributes = {k: v for k, v in llama.__dict__.items() if not k.startswith("_")}
        hooks = {k: len(v) for k, v in llama.__dict__.items() if k.endswith("hooks")}
        return sorted(llama.__dict__), attributes, hooks, llama.config._attn_implementation

    before = picture()
    assert pykvcache.patch(llama) is llama
    assert llama.config._attn_implementation == "pykvcache"
    assert pykvcache.unpatch(llama) is llama
    assert picture() == before
    counters.reset()
    greedy_tokens(llama)
    assert counters.paged == 0


def test_patch_twice(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    assert pykvcache.patch(llama, block_size=4) is llama
    with pytest.raises(ValueError, match="patched with other settings"):
        pykvcache.patch(llama, block_size=8)
    pykvcache.unpatch(llama)
    with pytest.raises(ValueError, match="is not patched"):
        pykvcache.unpatch(llama)


def test_foreign_override_is_kept(llama: PreTrainedModel) -> None:
    calls = []
    original = llama._prepare_cache_for_generation

    def override(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    llama._prepare_cache_for_generation = override
    pykvcache.patch(llama)
    counters.reset()
    greedy_tokens(llama)
    assert len(calls) == 1
    assert counters.paged > 0
    pykvcache.unpatch(llama)
    assert llama._prepare_cache_for_generation is override


def test_copy_of_a_patched_model_is_patched(llama: PreTrainedModel) -> None:
    expected = greedy_tokens(llama)
    pykvcache.patch(llama, block_size=4)
    twin = copy.deepcopy(llama)
    pykvcache.unpatch(llama)
    counters.reset()
    assert torch.equal(greedy_tokens(twin), expected)
    assert counters.paged > 0
    pykvcache.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(greedy_tokens(twin), expected)


def test_saved_model_knows_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    pykvcache.patch(llama)
    llama.save_pretrained(tmp_path)
    assert "pykvcache" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_pickled_model_generates_the_same(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = llama.generate(**inputs_for(llama), **options)
    again = pickle.loads(pickle.dumps(llama))
    assert torch.equal(again.generate(**inputs_for(llama), **options), expected)


def test_training_is_untouched(llama: PreTrainedModel) -> None:
    def gradients() -> list[torch.Tensor]:
        llama.train()
        llama.zero_grad()
        inputs = inputs_for(llama)
        out = llama(**inputs, labels=inputs["input_ids"])
        assert type(out.past_key_values) is DynamicCache
        out.loss.backward()
        return [p.grad.clone() for p in llama.parameters()]

    expected = gradients()
    pykvcache.patch(llama)
    for got, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_backward_through_blocks_is_refused(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache = PagedCache(llama.config)
    out = llama(**inputs_for(llama), past_key_values=cache)
    with pytest.raises(RuntimeError, match="no gradient"):
        out.logits.sum().backward()


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_backward_through_blocks_is_an_error_whatever_is_trained(
    llama: PreTrainedModel, trained: str
) -> None:
    for name, parameter in llama.named_parameters():
        parameter.requires_grad = f"layers.0.self_attn.{trained}" in name
    pykvcache.patch(llama)
    cache = PagedCache(llama.config)
    logits = llama(torch.randint(3, 60, (1, 5)).to(DEVICE), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.sum().backward()


@pytest.mark.parametrize("prompt", [1, 5])
def test_heads_that_are_too_wide_are_refused_before_anything_runs(prompt: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=640, vocab_size=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 60, (1, prompt)).to(DEVICE)
    before = model.generate(ids, max_new_tokens=3, do_sample=False)
    with pykvcache.patched(model), pytest.raises(ValueError, match="D must be 1 to 576, got 640"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), before)
