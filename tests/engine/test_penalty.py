"""The repetition penalty: one call of transformers' processor for all rows, on distinct tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import DEVICE, make_model
from workload import assert_empty, make_engine, make_prompts, random_prompt

from pykvcache import Sampling
from pykvcache.engine.distinct import Distinct, stacked

PENALTY = 1.7


def generated(prompt: list[int]) -> list[int]:
    tokens = make_model("llama").generate(
        torch.tensor([prompt], device=DEVICE),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=PENALTY,
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 24}, {"token_budget": 5}])
def test_one_call_serves_all_rows_of_a_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [generated(prompt) for prompt in make_prompts() for _ in range(2)]
    calls: list[tuple[int, ...]] = []
    original = transformers.RepetitionPenaltyLogitsProcessor.__call__

    def counting(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(input_ids.shape))
        return original(self, input_ids, scores)

    monkeypatch.setattr(transformers.RepetitionPenaltyLogitsProcessor, "__call__", counting)
    engine = make_engine(**settings)
    sampling = Sampling(max_new_tokens=12, repetition_penalty=PENALTY, n=2)
    outputs = engine.generate(make_prompts(), sampling)
    assert [output.token_ids for output in outputs] == wanted
    assert len(calls) <= engine.stats().steps + 1  # a prompt's samples can have a call of their own
    assert max(width for _, width in calls) <= 30 + 12
    assert_empty(engine)


def test_long_texts_of_few_tokens_make_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text itself is looked at once, for the first token."""
    engine = make_engine(num_blocks=600)
    lengths: list[int] = []
    text = engine._loop._text

    def counting(request: Any, start: int = 0) -> Any:
        tokens = text(request, start)
        lengths.append(len(tokens))
        return tokens

    monkeypatch.setattr(engine._loop, "_text", counting)
    prompt = random_prompt(20, 1) * 50
    sampling = Sampling(max_new_tokens=10, repetition_penalty=2, stop=[[1, 2, 3]])
    output = engine.generate([prompt], sampling)[0]
    assert len(set(output.token_ids)) == 10
    assert sorted(lengths)[-2:] == [3, 1010]  # ends of the output, and all at the end


def test_distinct_tokens_grow_with_the_text() -> None:
    prompt = np.unique(np.array([5, 3, 5, 9]))
    texts = [Distinct(prompt, np.array([7, 7])), Distinct(prompt, np.empty(0, np.int64))]
    for token in [3, 7, 8, *range(20, 60), 8]:
        texts[0].add(token)
    assert texts[0].output.tolist() == [7, 3, 8, *range(20, 60)]
    rows = stacked(texts)
    assert [set(row) for row in rows.tolist()] == [{3, 5, 7, 8, 9, *range(20, 60)}, {3, 5, 9}]
    assert rows.dtype == np.int64 and rows.shape == (2, 3 + 43)
