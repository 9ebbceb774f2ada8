"""Processors of transformers run once for many rows, and give each row what it gets alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr
from families import DEVICE, VOCAB, make_model
from workload import assert_empty, expected, make_engine, make_prompts, one_by_one, random_prompt

import pykvcache
from pykvcache import Sampling
from pykvcache.engine import rules
from pykvcache.engine.rules import Rule, Texts, Tokens, look_of, process

NEVER = next(t for t in range(VOCAB) if not any(t in tokens for tokens in expected("llama")))
KNOWN: dict[str, Callable[[], Any]] = {
    "suppress": lambda: tr.SuppressTokensLogitsProcessor([5, 6]),
    "begin": lambda: tr.SuppressTokensAtBeginLogitsProcessor([5, 6], 3),
    "no_repeat_1": lambda: tr.NoRepeatNGramLogitsProcessor(1),
    "no_repeat_2": lambda: tr.NoRepeatNGramLogitsProcessor(2),
    "no_repeat_4": lambda: tr.NoRepeatNGramLogitsProcessor(4),
    "bias": lambda: tr.SequenceBiasLogitsProcessor(
        [[[3], 2.0], [[1, 3], -4.0], [[2, 1, 3], 0.7], [[2, 2, 1, 3], 0.3], [[4, 4, 1], 1.5]]
    ),
    "bad_words": lambda: tr.NoBadWordsLogitsProcessor([[3], [1, 2], [4, 4, 1]], [7]),
    "min_length": lambda: tr.MinLengthLogitsProcessor(4, [5, 6]),
    "min_new": lambda: tr.MinNewTokensLengthLogitsProcessor(2, 2, [5, 6]),
    "bos": lambda: tr.ForcedBOSTokenLogitsProcessor(8),
    "eos": lambda: tr.ForcedEOSTokenLogitsProcessor(5, [5, 6]),
    "decay": lambda: tr.ExponentialDecayLengthPenalty((1, 1.5), [5, 6], 2),
    "valid": tr.InfNanRemoveLogitsProcessor,
    "normal": tr.LogitNormalization,
    "temperature": lambda: tr.TemperatureLogitsWarper(0.7),
    "top_k": lambda: tr.TopKLogitsWarper(3),
    "top_p": lambda: tr.TopPLogitsWarper(0.6),
    "min_p": lambda: tr.MinPLogitsWarper(0.2),
    "typical": lambda: tr.TypicalLogitsWarper(0.5),
    "epsilon": lambda: tr.EpsilonLogitsWarper(0.1),
    "eta": lambda: tr.EtaLogitsWarper(0.1),
}


def rows_of(texts: list[list[int]]) -> Texts:
    return Texts([len(text) for text in texts], lambda row, start: np.array(texts[row][start:]))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("most", [2**20, 30])
def test_rows_together_get_what_they_get_alone(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MOST_TOKENS", most)
    generator = random.Random(name)
    texts = [[generator.randint(1, 4) for _ in range(n)] for n in [*range(1, 9), 3, 3, 40, 70, 5]]
    scores = torch.randn(len(texts), 12, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 3
    scores[2, 4] = -torch.inf
    alone = KNOWN[name]()
    wanted = [
        alone(torch.tensor([text], device=DEVICE), row[None])[0]
        for text, row in zip(texts, scores, strict=True)
    ]
    rule = Rule(together := KNOWN[name](), look_of(together))
    assert rule.look is not None
    errors: dict[int, Exception] = {}
    got = process([[rule]] * len(texts), rows_of(texts), scores.clone(), errors)
    assert not errors and torch.equal(got, torch.stack(wanted))


def test_what_a_rule_raises_is_told_of_the_row_whose_fault_it_is() -> None:
    def picky(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if (scores > 5).any():
            raise ValueError("too high")
        return scores + 1

    scores, errors = torch.tensor([[1.0, 2.0], [3.0, 9.0], [0.0, 4.0]]), dict[int, Exception]()
    stage = [Rule(picky, Tokens(0))]
    got = process([stage] * 3, rows_of([[1], [2], [3]]), scores, errors)
    assert got[[0, 2]].tolist() == [[2.0, 3.0], [1.0, 5.0]]
    assert list(errors) == [1] and "too high" in str(errors[1])


SHARED: dict[str, dict[str, Any]] = {
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[5], -9.0], [[6, 7], 4.0]]},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[5], [6, 7]]},
    "MinLengthLogitsProcessor": {"min_length": 14},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 8},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 8},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": 7},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {"exponential_decay_length_penalty": (2, 1.001)},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [5, 6]},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [5, 6]},
}


def count_calls(monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    original = kind.__call__

    def counting(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(input_ids.shape))
        return original(self, input_ids, scores)

    monkeypatch.setattr(kind, "__call__", counting)
    return shapes


@pytest.mark.parametrize("name", SHARED)
def test_rows_of_different_lengths_share_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.update(eos_token_id=[NEVER], **SHARED[name])
    prompts = [random_prompt(n, n) for n in range(16, 28)]
    engine = pykvcache.Engine(model, block_size=4, num_blocks=400)
    calls = count_calls(monkeypatch, getattr(tr, name))
    outputs = engine.generate(prompts, max_new_tokens=10)
    assert sum(rows for rows, _ in calls) == 120  # a token of a request is processed once
    assert len(calls) <= 2 * engine.stats().steps  # lengths above and below 32, or a limit
    assert [output.token_ids for output in outputs] == [one_by_one(model, p) for p in prompts]


def random_fields(seed: int) -> dict[str, Any]:
    generator = random.Random(seed)
    tokens = [t for output in expected("llama") for t in output]
    pick = lambda n: [generator.choice(tokens) for _ in range(n)]  # noqa: E731
    fields = {
        "sequence_bias": [[pick(n), generator.uniform(-9, 5)] for n in (1, 1, 2, 3)],
        "encoder_repetition_penalty": generator.uniform(0.5, 2),
        "no_repeat_ngram_size": generator.randint(1, 3),
        "encoder_no_repeat_ngram_size": generator.randint(1, 3),
        "bad_words_ids": [pick(n) for n in (1, 2, 2)],
        "min_length": generator.randint(2, 30),
        "min_new_tokens": generator.randint(1, 12),
        "forced_bos_token_id": generator.choice(tokens),
        "forced_eos_token_id": pick(2),
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (generator.randint(-3, 6), generator.uniform(1, 2)),
        "suppress_tokens": pick(3),
        "begin_suppress_tokens": pick(5),
        "repetition_penalty": generator.uniform(0.8, 1.8),
    }
    chosen = generator.sample(sorted(fields), generator.randint(2, 6))
    return {"eos_token_id": pick(3), **{name: fields[name] for name in chosen}}


@pytest.mark.parametrize("seed", range(12))
def test_random_configs_give_what_generate_gives(seed: int) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.update(**random_fields(seed))
    prompts = [*make_prompts(), [5]]
    wanted = [one_by_one(model, prompt, 14) for prompt in prompts]
    for settings in ({"num_blocks": 300}, {"num_blocks": 40, "token_budget": 9}):
        engine = pykvcache.Engine(model, block_size=4, **settings)
        outputs = engine.generate(prompts, max_new_tokens=14)
        assert [output.token_ids for output in outputs] == wanted
        assert_empty(engine)


def generated(prompt: list[int], processors: list[Any]) -> list[int]:
    tokens = make_model("llama").generate(
        torch.tensor([prompt], device=DEVICE),
        max_new_tokens=10,
        do_sample=False,
        logits_processor=tr.LogitsProcessorList(processors),
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("alone", [False, True])
def test_processors_of_users_share_calls_where_they_are_known(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(tr.NoRepeatNGramLogitsProcessor):
        """May do anything with input_ids."""

    calls = count_calls(monkeypatch, tr.NoRepeatNGramLogitsProcessor)
    suppress = tr.SuppressTokensLogitsProcessor([t for o in expected("llama") for t in o[:2]])
    processors = [suppress, (Own if alone else tr.NoRepeatNGramLogitsProcessor)(1)]
    engine = make_engine()
    outputs = engine.generate(make_prompts(), Sampling(max_new_tokens=10, processors=processors))
    rows = [rows for rows, _ in calls]
    assert sum(rows) == 10 * len(make_prompts())
    assert (set(rows) == {1}) is alone
    assert [output.token_ids for output in outputs] == [
        generated(prompt, processors) for prompt in make_prompts()
    ]


def test_a_known_processor_that_raises_ends_its_own_requests() -> None:
    engine = make_engine()
    bad = Sampling(processors=[tr.SequenceBiasLogitsProcessor([[[VOCAB + 5], 1.0]])], n=3)
    guilty = engine.submit(make_prompts()[0], bad)
    outputs = engine.generate(make_prompts()[1:4], max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected("llama")[1:4]
    with pytest.raises(ValueError, match="vocabulary size"):
        guilty.result()
    assert [output.finish_reason for output in guilty.outputs] == ["error"] * 3
    assert_empty(engine)
