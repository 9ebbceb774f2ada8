"""Greedy outputs of the engine are those of `generate`, one prompt at a time, however it runs."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, FAMILIES, VOCAB, make_model, randomize
from workload import (
    NEW_TOKENS,
    PACKED,
    always_swap,
    assert_empty,
    expected,
    make_engine,
    make_prompts,
    one_by_one,
)

import pykvcache
from pykvcache.hf import counters

SCHEDULES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "tiny budget": {"token_budget": 3},
    "small pool": {"num_blocks": 40, "prefix_cache": False},
    "small pool with prefixes": {"num_blocks": 40},
    "few lanes": {"block_size": 3, "token_budget": 7, "max_running": 3},
    "swapping": {"num_blocks": 45, "swap_memory": "1GiB", "prefix_cache": False},
    "swapping with prefixes": {"num_blocks": 45, "swap_memory": "1GiB"},
}
GATHERING = ("deepseek_v3", "diffllama", "jetmoe")


@pytest.mark.parametrize("family", PACKED)
def test_every_family_under_every_schedule(family: str) -> None:
    for name, settings in SCHEDULES.items():
        engine = make_engine(family, **settings)
        always_swap(engine)
        for _ in range(2):  # the second time prefixes are there
            outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
            assert [output.token_ids for output in outputs] == expected(family), name
            assert {output.finish_reason for output in outputs} == {"length"}
        assert_empty(engine)


def test_no_family_gathers_without_need() -> None:
    for family in PACKED:
        engine = make_engine(family)
        counters.reset()
        engine.generate(make_prompts(), max_new_tokens=3)
        assert (counters.gathered > 0) == (family in GATHERING), family


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PACKED)))
def test_models_that_cannot_be_packed_get_one_clear_error(family: str) -> None:
    model = make_model(family)
    with pytest.raises(ValueError, match="cannot be packed: ") as error:
        pykvcache.Engine(model, num_blocks=10)
    assert type(model).__name__ in str(error.value)
    assert "\n" not in str(error.value)


MOSHI = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "max_position_embeddings": 256,
}


def test_a_window_of_the_cache_alone_is_refused_however_long_it_is() -> None:
    for window in (16, 200):
        model = transformers.MoshiForCausalLM(transformers.MoshiConfig(**MOSHI))
        model.config.sliding_window = window
        with pytest.raises(ValueError, match="MoshiForCausalLM cannot be packed") as error:
            pykvcache.Engine(randomize(model), num_blocks=10)
        assert str(error.value).endswith(
            f"layer 0 caches a window of {window} tokens, but its mask shows all tokens"
        )


def test_masks_of_a_layers_own_making_are_refused_where_it_has_a_window() -> None:
    model = copy.deepcopy(make_model("mistral"))
    for layer in model.model.layers:  # hands its attention another tensor than it was given
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"attention_mask": other_mask(kwargs)}),
            with_kwargs=True,
        )
    with pytest.raises(ValueError, match=r"a window of 6 tokens, but its mask is not known"):
        pykvcache.Engine(model, num_blocks=10)


def other_mask(kwargs: dict[str, Any]) -> torch.Tensor:
    return kwargs["attention_mask"] & True


@pytest.mark.parametrize("layers", [[], [9], [1]])
def test_mllama_gets_one_clear_error(layers: list[int]) -> None:
    """It looks into its cache for keys of images, also where no layer would have them."""
    config = transformers.MllamaTextConfig(**DECODER, cross_attention_layers=layers)
    model = randomize(transformers.MllamaForCausalLM(config))
    try:
        engine = pykvcache.Engine(model, num_blocks=10)
    except ValueError as error:
        assert re.fullmatch("MllamaForCausalLM cannot be packed: .+", str(error))
    else:  # before 5.23 it looks only where it has such layers
        assert engine.generate([[5, 6]], max_new_tokens=9)[0].token_ids == one_by_one(
            model, [5, 6], 9
        )


def test_code_that_fails_on_a_packed_cache_gives_one_clear_error() -> None:
    model = copy.deepcopy(make_model("llama"))
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["past_key_values"].layers[0].keys.shape and None,
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match=r"fails on a packed cache \(AttributeError: ") as error:
        pykvcache.Engine(model, num_blocks=10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_preempting_somebody_at_every_step(family: str) -> None:
    engine = make_engine(family, token_budget=16)
    choice = random.Random(0)
    handles = [engine.submit(p, max_new_tokens=NEW_TOKENS) for p in make_prompts()]
    scheduler = engine._scheduler
    preempted = 0
    while not all(handle.done for handle in handles):
        engine.step()
        running = [r for r in scheduler.lanes.requests if r is not None]
        first = min(running, key=lambda r: r.key, default=None)
        victims = [r for r in running if r is not first]
        if victims:
            scheduler.preempt(choice.choice(victims))
            preempted += 1
    assert [h.outputs[0].token_ids for h in handles] == expected(family)
    assert engine.stats().preemptions == preempted > 10
    assert sum(h.outputs[0].preemptions for h in handles) == preempted
    assert_empty(engine)


@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_and_cancellations(seed: int) -> None:
    choice = random.Random(seed)
    engine = make_engine(
        num_blocks=choice.choice([40, 60, 200]),
        token_budget=choice.choice([2, 9, 64]),
        prefix_cache=seed % 2 == 0,
    )
    waiting = list(enumerate(make_prompts()))
    choice.shuffle(waiting)
    handles: dict[int, Any] = {}
    cancelled = set()
    while waiting or not all(handle.done for handle in handles.values()):
        if waiting and choice.random() < 0.5:
            index, prompt = waiting.pop()
            priority = choice.randrange(3)
            handles[index] = engine.submit(prompt, max_new_tokens=NEW_TOKENS, priority=priority)
        if handles and choice.random() < 0.05:
            index = choice.choice(list(handles))
            if not handles[index].done:
                handles[index].cancel()
                cancelled.add(index)
        engine.step()
    for index, handle in handles.items():
        output = handle.outputs[0]
        whole = expected("llama")[index]
        assert output.token_ids == whole[: len(output.token_ids)]
        assert (output.finish_reason == "cancelled") == (index in cancelled)
        assert len(output.token_ids) == NEW_TOKENS or index in cancelled
    assert_empty(engine)


@pytest.mark.parametrize("block_size", [1, 2, 16, 64])
def test_any_block_size(block_size: int) -> None:
    engine = make_engine("gemma3", block_size=block_size, num_blocks=4000 // block_size)
    outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert [output.token_ids for output in outputs] == expected("gemma3")


def test_patched_and_compiled_models_work_too() -> None:
    model = copy.deepcopy(make_model("llama"))
    pykvcache.patch(model, block_size=4)
    outputs = pykvcache.Engine(model, num_blocks=99).generate(make_prompts(), max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected("llama")
    assert one_by_one(model, make_prompts()[0]) == expected("llama")[0]  # still patched


def test_bfloat16_follows_generate_closely() -> None:
    model = copy.deepcopy(make_model("llama")).to(torch.bfloat16)
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    reference = one_by_one(model, prompt)
    output = engine.generate([prompt], max_new_tokens=NEW_TOKENS)[0]
    same = sum(a == b for a, b in zip(output.token_ids, reference, strict=True))
    assert same >= 1 and len(output.token_ids) == NEW_TOKENS


def test_equal_prompts_are_computed_once() -> None:
    engine = make_engine(prefix_cache=False, token_budget=8)
    prompt = make_prompts()[4]
    outputs = engine.generate([prompt] * 6, max_new_tokens=NEW_TOKENS)
    assert {tuple(output.token_ids) for output in outputs} == {tuple(expected("llama")[4])}
    assert [output.cached_tokens for output in outputs] == [0] + [len(prompt)] * 5
    computed = engine._loop.meter._tokens
    assert computed == len(prompt) + 6 * (NEW_TOKENS - 1)
