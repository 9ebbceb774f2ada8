"""Weights that change under an engine: nothing stale is reused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, make_model, randomize
from workload import (
    NEW_TOKENS,
    assert_empty,
    expected,
    make_prompts,
    one_by_one,
    random_prompt,
)

import pykvcache


def other_rotary(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    return type(model.model.rotary_emb)(config)


def test_changed_weights_are_noticed() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    weight = model.model.layers[0].self_attn.v_proj.weight
    changes: dict[str, Any] = {
        "in place": lambda: weight.mul_(1.5),
        "through data": lambda: weight.data.mul_(-1),
        "replaced": lambda: setattr(weight, "data", weight.data + 1),
        "other frequencies": lambda: model.model.rotary_emb.inv_freq.mul_(0.25),
        "other rotary module": lambda: setattr(model.model, "rotary_emb", other_rotary(model)),
        "loaded": lambda: model.load_state_dict(make_model("llama").state_dict()),
    }
    for name, change in changes.items():
        assert engine.generate([prompt], max_new_tokens=8)[0].token_ids == one_by_one(
            model, prompt, 8
        )
        again = engine.generate([prompt], max_new_tokens=8)[0]
        assert again.cached_tokens == len(prompt) - 1
        with torch.no_grad():
            change()
        output = engine.generate([prompt], max_new_tokens=8)[0]
        assert output.token_ids == one_by_one(model, prompt, 8), name
        assert output.cached_tokens == 0, name


def test_weights_that_change_between_submit_and_step_are_noticed() -> None:
    model = copy.deepcopy(make_model("llama"))
    other = {name: value * 1.3 for name, value in make_model("llama").state_dict().items()}
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4, token_budget=8)
    prompt = make_prompts()[4]
    engine.generate([prompt], max_new_tokens=4)
    handle = engine.submit(prompt, max_new_tokens=8)
    model.load_state_dict(other)
    output = handle.result()[0]
    assert (output.token_ids, output.cached_tokens) == (one_by_one(model, prompt, 8), 0)
    engine.submit(prompt, max_new_tokens=8)  # begins under these weights
    engine.step()
    engine.step()
    model.load_state_dict(make_model("llama").state_dict())
    late = engine.submit(prompt, max_new_tokens=8).result()[0]
    assert (late.token_ids, late.cached_tokens) == (one_by_one(model, prompt, 8), 0)


def test_weights_that_changed_for_a_while_leave_nothing_behind() -> None:
    """Only one request runs, nobody waits, and the weights are the old ones when one comes."""
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    weight = model.model.layers[0].self_attn.v_proj.weight
    handle = engine.submit(make_prompts()[4], max_new_tokens=30)
    engine.step()
    before = weight.data
    weight.data = before * -2
    for _ in range(20):
        engine.step()
    weight.data = before
    text = make_prompts()[4] + handle.result()[0].token_ids
    output = engine.generate([text], max_new_tokens=4)[0]
    fresh = pykvcache.Engine(model, num_blocks=200, block_size=4)
    again = fresh.generate([text], max_new_tokens=4)[0]
    assert (output.token_ids, output.cached_tokens) == (again.token_ids, 0)


@pytest.mark.parametrize("place", ["look", "forget", "accept"])
def test_an_interrupt_while_weights_are_compared_is_no_way_to_stale_blocks(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    engine.generate([prompt], max_new_tokens=2)
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)
    owner: Any
    owner, name = {
        "look": (engine._guard, "changed"),
        "forget": (engine._blocks, "forget"),
        "accept": (engine._guard, "accept"),
    }[place]

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt], max_new_tokens=8)
    monkeypatch.undo()
    output = engine.generate([prompt], max_new_tokens=8)[0]
    assert (output.token_ids, output.cached_tokens) == (one_by_one(model, prompt, 8), 0)


def test_a_model_in_training_mode_runs_no_step() -> None:
    model = copy.deepcopy(make_model("gpt2"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    handle = engine.submit(prompt, max_new_tokens=NEW_TOKENS)
    for _ in range(3):
        engine.step()
    model.train()
    for call in (engine.step, lambda: engine.generate([prompt]), lambda: engine.score([1], [[2]])):
        with pytest.raises(ValueError, match=r"is in training mode; call model.eval\(\) first"):
            call()
    model.eval()
    assert handle.result()[0].token_ids == expected("gpt2")[4]
    assert handle.outputs[0].preemptions == 0
    assert_empty(engine)
    model.train()
    assert engine.step() == []  # nothing to do


def test_what_a_part_in_training_mode_has_computed_is_not_reused() -> None:
    model = copy.deepcopy(make_model("gpt2"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    model.transformer.train()
    engine.generate([prompt], max_new_tokens=NEW_TOKENS)
    model.transformer.eval()
    output = engine.generate([prompt], max_new_tokens=NEW_TOKENS)[0]
    assert (output.token_ids, output.cached_tokens) == (expected("gpt2")[4], 0)


def test_rotary_embeddings_that_look_at_the_whole_forward_bound_a_request() -> None:
    config = transformers.Phi3Config(
        **DECODER,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    )
    model = randomize(transformers.Phi3ForCausalLM(config))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompts = [random_prompt(n, n) for n in (5, 22)]
    for _ in range(2):
        outputs = engine.generate(prompts, max_new_tokens=10)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.token_ids == one_by_one(model, prompt)
    assert outputs[1].cached_tokens == 21  # these embeddings write a buffer in every forward
    with pytest.raises(ValueError, match="longer than the 32 positions of the original range"):
        engine.generate([random_prompt(30, 1)], max_new_tokens=4)


def test_requests_whose_tokens_a_smaller_vocabulary_lacks_end_alone() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=200, token_budget=8)
    last = model.config.vocab_size - 1
    texts = [[5, last, 6], [7, 8, 9], [3] * 30 + [last], [3] * 30]
    handles = [engine.submit(text, max_new_tokens=40) for text in texts]
    for _ in range(2):
        engine.step()
    model.resize_token_embeddings(last)
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[4] = 1  # the others go on with what there still is
    for handle, text in zip(handles, texts, strict=True):
        if last in text:
            with pytest.raises(ValueError, match=f"token {last} .*ends at {last - 1} now"):
                handle.result()
        else:
            assert handle.result()[0].finish_reason == "length"
    assert_empty(engine)


@pytest.mark.parametrize("change", [-1, 22])
def test_rules_follow_a_vocabulary_that_changes_while_requests_run(change: int) -> None:
    """Nobody submits anything after that."""
    model = copy.deepcopy(make_model("llama"))
    last = model.config.vocab_size - 1
    model.generation_config.bad_words_ids = [[9]]
    model.generation_config.sequence_bias = {(8, 7): 0.5}
    model.generation_config.eos_token_id = last
    engine = pykvcache.Engine(model, block_size=4, num_blocks=200, token_budget=8)
    sampling = pykvcache.Sampling(max_new_tokens=12, min_new_tokens=9)
    handles = [engine.submit([7, 8, 9], sampling), engine.submit([3] * 5, max_new_tokens=12)]
    for _ in range(3):
        engine.step()
    model.resize_token_embeddings(last + 1 + change)
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[4] = 1
    assert [handle.result()[0].finish_reason for handle in handles] == ["length", "length"]
    assert_empty(engine)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_score_ends_when_a_smaller_vocabulary_lacks_its_tokens(place: int) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=200, token_budget=8)
    last = model.config.vocab_size - 1
    changed = []

    def shrink(event: Any) -> None:
        if not changed:
            changed.append(model.resize_token_embeddings(last))

    handle = engine.submit([1, 2], max_new_tokens=3, on_token=shrink)
    with pytest.raises(ValueError, match=f"token {last} .*ends at {last - 1} now"):
        lacking = [7, 8, 9]
        lacking[place] = last
        engine.score([4] * 30, [[5, 6], lacking])
    assert changed
    handle.cancel()
    assert_empty(engine)
