"""What the generation config of a model says is what `generate` and the engine do."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import DEVICE, make_model
from workload import assert_empty, expected, make_prompts, one_by_one

import pykvcache
from pykvcache import Sampling

ENDS = sorted({tokens[1] for tokens in expected("llama")})
COMMON = [tokens[2] for tokens in expected("llama")]
RARE = next(t for t in range(97) if not any(t in tokens for tokens in expected("llama")))
CASES: dict[str, dict[str, Any]] = {
    "sequence_bias": {"sequence_bias": [[[COMMON[0]], -9.0], [[COMMON[1], 7], 4.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[COMMON[0]], [COMMON[1], COMMON[2]]]},
    "min_length": {"min_length": 14},
    "min_new_tokens": {"min_new_tokens": 5},
    "forced_bos_token_id": {"forced_bos_token_id": 8},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 3.0)},
    "suppress_tokens": {"suppress_tokens": COMMON[:4]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [t[0] for t in expected("llama")]},
    "several": {"suppress_tokens": [1], "min_new_tokens": 4, "repetition_penalty": 1.5},
}


def configured(ends: list[int] | None = None, **fields: Any) -> Any:
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.update(eos_token_id=ENDS if ends is None else ends, **fields)
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("settings", [{"num_blocks": 200}, {"num_blocks": 30, "token_budget": 7}])
def test_every_field_is_followed(name: str, settings: dict[str, Any]) -> None:
    ends = ENDS if name.startswith("min_") or name == "several" else [RARE]
    model = configured(ends, **CASES[name])
    engine = pykvcache.Engine(model, block_size=4, **settings)
    wanted = [one_by_one(model, prompt) for prompt in make_prompts() for _ in range(2)]
    plain = configured(ends)
    assert wanted != [one_by_one(plain, prompt) for prompt in make_prompts() for _ in range(2)]
    outputs = engine.generate(make_prompts(), Sampling(max_new_tokens=10, n=2))
    assert [output.token_ids for output in outputs] == wanted
    assert_empty(engine)


def test_a_request_may_have_a_minimum_of_its_own() -> None:
    model = configured(min_new_tokens=6)
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    prompt = make_prompts()[1]
    for least in (0, 1, 3, 8):
        wanted = model.generate(
            torch.tensor([prompt], device=DEVICE),
            max_new_tokens=10,
            do_sample=False,
            min_new_tokens=least,
        )
        output = engine.generate([prompt], Sampling(max_new_tokens=10, min_new_tokens=least))[0]
        assert output.token_ids == wanted[0, len(prompt) :].tolist()


def test_a_config_is_read_when_requests_come_and_others_keep_their_processors() -> None:
    model = configured()
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    prompt = make_prompts()[1]
    assert engine.generate([prompt], max_new_tokens=10)[0].token_ids == one_by_one(model, prompt)
    model.generation_config.min_new_tokens = 7
    handle = engine.submit(prompt, max_new_tokens=10)
    engine.step()
    made = handle.samples[0].ruled
    engine.submit(make_prompts()[0], max_new_tokens=2).result()
    assert made is not None and handle.samples[0].ruled is made
    assert handle.result()[0].token_ids == one_by_one(model, prompt)
    model.generation_config.bad_words_ids = []
    with pytest.raises(ValueError, match="bad_words_ids"):
        engine.submit(prompt)
    assert_empty(engine)


def test_fields_that_are_not_followed_are_named_once() -> None:
    model = configured(num_beams=3, guidance_scale=1.5, temperature=0.3)
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    with pytest.warns(
        UserWarning, match="does not follow num_beams, guidance_scale of the"
    ) as all_:
        engine.generate([make_prompts()[0]], max_new_tokens=1)
    assert [warning.filename for warning in all_] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([make_prompts()[0]], max_new_tokens=1)
        pykvcache.Engine(configured(), num_blocks=9).generate([[1]], max_new_tokens=1)


def test_processors_fit_a_vocabulary_that_has_changed() -> None:
    model = configured(bad_words_ids=[[COMMON[0]], [COMMON[1], COMMON[2]]])
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    prompt = make_prompts()[1]
    for size in (97, 130, 97):
        model.resize_token_embeddings(size)
        tokens = engine.generate([prompt], max_new_tokens=10)[0].token_ids
        assert tokens == one_by_one(model, prompt)


def test_what_needs_an_end_of_text_does_nothing_without_one() -> None:
    model = configured([], min_length=14, no_repeat_ngram_size=1)
    model.generation_config.eos_token_id = None
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    prompt = make_prompts()[1]
    tokens = engine.generate([prompt], max_new_tokens=10)[0].token_ids
    assert tokens == one_by_one(model, prompt)
