"""What processors of users give back: scores, or one clear error for their own request."""

from __future__ import annotations

import copy
import gc
import traceback
import weakref
from typing import Any

import pytest
import torch
from families import make_model
from workload import assert_empty, expected, make_engine, make_prompts

import pykvcache
from pykvcache import Sampling

BAD: dict[str, Any] = {
    r"processor none must return float scores \[1, 97\], got NoneType": lambda s: None,
    r"processor none must return float scores \[1, 97\], got torch.int64": lambda s: s.long(),
    r"processor none must return scores \[1, 97\], got \[1, 5\]": lambda s: s[:, :5],
    r"processor none must return scores \[1, 97\], got \[1, 1\]": lambda s: s[:, :1],
    r"processor none must return scores \[1, 97\], got \[97\]": lambda s: s[0],
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("followed", [False, True])
def test_what_is_no_scores_ends_its_request(
    message: str, temperature: float | None, followed: bool
) -> None:
    def none(input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return BAD[message](scores)

    after = [lambda ids, scores: scores] if followed else []
    _refused(Sampling(processors=[none, *after], temperature=temperature), message)


NO_TOKEN = "no token can be drawn: all scores are -inf, or one is nan or inf"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sampling_from_what_is_no_distribution_is_an_error_as_in_generate(value: float) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ValueError, match=NO_TOKEN):
        engine.generate([[5, 6, 7]], Sampling(max_new_tokens=4, temperature=1.0, logprobs=0))
    with pytest.raises(RuntimeError):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=True)
    assert_empty(engine)


@pytest.mark.parametrize(
    ("value", "temperature"),
    [(torch.nan, 1.0), (torch.nan, None), (-torch.inf, 1.0), (torch.inf, 1.0)],
)
def test_scores_from_which_nothing_can_be_drawn_end_their_request(
    value: float, temperature: float | None
) -> None:
    fill = Sampling(processors=[lambda ids, s: torch.full_like(s, value)], temperature=temperature)
    _refused(fill, NO_TOKEN if temperature else "processors leave a score that is nan")


def _refused(sampling: Sampling, message: str) -> None:
    engine = make_engine()
    guilty = engine.submit(make_prompts()[0], sampling)
    outputs = engine.generate(make_prompts()[1:4], max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected("llama")[1:4]
    with pytest.raises((TypeError, ValueError), match=message) as error:
        guilty.result()
    assert "\n" not in str(error.value)
    assert_empty(engine)


def test_a_processor_that_writes_into_the_text_changes_its_copy_only() -> None:
    def write(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        input_ids.zero_()
        return scores

    engine = make_engine()
    sampling = Sampling(max_new_tokens=10, processors=[write], n=2, logprobs=0)
    for output in engine.generate([make_prompts()[1]], sampling):
        assert output.token_ids == expected("llama")[1]
    assert_empty(engine)


def test_an_error_keeps_no_scores_alive() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(scores))
        try:
            raise KeyError("cause")
        except KeyError as error:
            raise RuntimeError("broken") from error

    engine = make_engine()
    handle = engine.submit(make_prompts()[0], Sampling(max_new_tokens=2, processors=[broken]))
    while not handle.done:
        engine.step()
    gc.collect()
    error = handle.outputs[0].error
    assert str(error) == "broken" and seen[0]() is None
    assert "in broken" in "".join(traceback.format_exception(error))
