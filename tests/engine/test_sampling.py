"""Sampling, stopping, log-probabilities, scores and streams."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from families import DEVICE, VOCAB, make_model
from workload import assert_empty, expected, make_engine, make_prompts, random_prompt

import pykvcache
from pykvcache import Sampling
from pykvcache.engine import Event

PROMPT = random_prompt(9, 9)
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 8}


def next_logs(tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [length, V] by the stock model."""
    with torch.no_grad():
        text = torch.tensor([tokens], device=DEVICE)
        return make_model("llama")(text).logits[0].cpu().log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"token_budget": 2}, {"num_blocks": 16}, {"max_running": 2}, {"prefix_cache": False}],
)
def test_a_seed_decides_the_tokens_whatever_else_runs(settings: dict[str, Any]) -> None:
    sampling = Sampling(**SAMPLED, seed=7, n=3)
    alone = [output.token_ids for output in make_engine().generate([PROMPT], sampling)]
    assert len({tuple(tokens) for tokens in alone}) == 3  # samples differ
    prompts = [make_prompts()[1], PROMPT, make_prompts()[2]]
    engine = make_engine(**settings)
    outputs = engine.generate(prompts, [Sampling(max_new_tokens=8), sampling, Sampling(**SAMPLED)])
    assert [output.token_ids for output in outputs[1:4]] == alone
    assert [(o.prompt_index, o.sample_index) for o in outputs] == [
        (0, 0),
        *((1, i) for i in range(3)),
        (2, 0),
    ]
    other = make_engine().generate([PROMPT], Sampling(**SAMPLED, seed=8, n=3))
    assert [output.token_ids for output in other] != alone
    assert_empty(engine)


def test_sampled_tokens_follow_the_distribution() -> None:
    """First tokens of 2,000 samples against the model's own probabilities, chi-squared."""
    sampling = Sampling(max_new_tokens=1, temperature=0.7, seed=3, n=2000)
    outputs = make_engine(num_blocks=3000, max_running=512).generate([PROMPT], sampling)
    counts = torch.bincount(torch.tensor([o.token_ids[0] for o in outputs]), minlength=VOCAB)
    wanted = (next_logs(PROMPT)[-1] / 0.7).softmax(-1) * 2000
    often = wanted > 5
    chi = ((counts - wanted)[often] ** 2 / wanted[often]).sum()
    assert chi < often.sum() + 5 * (2 * often.sum()) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1), ({"temperature": 0.0}, 1)],
)
def test_filters_keep_what_they_should(arguments: dict[str, Any], allowed: int) -> None:
    sampling = Sampling(max_new_tokens=1, n=200, **arguments)
    outputs = make_engine(num_blocks=600).generate([PROMPT], sampling)
    best = next_logs(PROMPT)[-1].topk(allowed).indices.tolist()
    assert {output.token_ids[0] for output in outputs} == set(best)


def test_repetition_penalty_and_processors_see_the_text() -> None:
    strong = Sampling(max_new_tokens=12, repetition_penalty=1e6)
    tokens = make_engine().generate([PROMPT], strong)[0].token_ids
    assert len(set(tokens) | set(PROMPT)) == len(tokens) + len(set(PROMPT))  # nothing twice
    seen: list[list[int]] = []

    def only_seven(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return torch.full_like(scores, -torch.inf).index_fill(
            1, torch.tensor([7], device=DEVICE), 0.0
        )

    outputs = make_engine().generate([PROMPT], Sampling(max_new_tokens=3, processors=[only_seven]))
    assert outputs[0].token_ids == [7, 7, 7]
    assert seen == [PROMPT, [*PROMPT, 7], [*PROMPT, 7, 7]]


def test_the_order_of_processors_and_the_penalty_of_the_config_are_those_of_generate() -> None:
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.repetition_penalty = 1.7
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)

    def fold(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.abs() - 3

    for processors in ([], [fold]):
        outputs = engine.generate(make_prompts(), Sampling(max_new_tokens=8, processors=processors))
        for prompt, output in zip(make_prompts(), outputs, strict=True):
            tokens = model.generate(
                torch.tensor([prompt], device=DEVICE),
                max_new_tokens=8,
                do_sample=False,
                logits_processor=transformers.LogitsProcessorList(processors),
            )
            assert output.token_ids == tokens[0, len(prompt) :].tolist()


def test_seeds_and_samples_are_independent() -> None:
    sampling = [Sampling(max_new_tokens=30, temperature=50.0, seed=s, n=2) for s in range(3)]
    outputs = make_engine(num_blocks=300).generate([PROMPT] * 3, sampling)
    runs = [output.token_ids for output in outputs]
    for i, one in enumerate(runs):
        for other in runs[i + 1 :]:
            for shift in range(-8, 9):
                pairs = zip(one[max(shift, 0) :], other[max(-shift, 0) :], strict=False)
                assert sum(a == b for a, b in pairs) < 8


def test_a_processor_that_raises_ends_its_own_request_only() -> None:
    def bad(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > len(PROMPT) + 1:
            raise ZeroDivisionError("from the processor")
        return scores

    engine = make_engine()
    guilty = engine.submit(PROMPT, Sampling(max_new_tokens=9, processors=[bad]))
    outputs = engine.generate(make_prompts(), max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected("llama")
    assert guilty.outputs[0].finish_reason == "error" and len(guilty.outputs[0].token_ids) == 2
    with pytest.raises(ZeroDivisionError, match="from the processor"):
        guilty.result()
    with pytest.raises(ZeroDivisionError):
        engine.generate([PROMPT], Sampling(max_new_tokens=9, processors=[bad]))
    with pytest.raises(ZeroDivisionError):
        list(engine.stream([PROMPT], Sampling(max_new_tokens=9, processors=[bad])))
    assert_empty(engine)


def test_processors_need_no_hash_and_equal_ones_are_not_mixed_up() -> None:
    @dataclasses.dataclass
    class Force:
        token: int = dataclasses.field(compare=False)
        __hash__: Any = None

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, self.token] = 1e4
            return scores

    class Hashed(Force):
        def __hash__(self) -> int:
            return 1

    engine = make_engine()
    for kind in (Force, Hashed):
        assert kind(5) == kind(6)
        settings = [Sampling(max_new_tokens=3, processors=[kind(token)]) for token in (5, 6)]
        outputs = engine.generate([PROMPT, PROMPT], settings)
        assert [output.token_ids for output in outputs] == [[5] * 3, [6] * 3]


@pytest.mark.parametrize("temperature", [1e-10, 1e-29, 1e-37, 1e-39, 1e-44, 1e-46, 1e-320])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=1)
    outputs = make_engine().generate(make_prompts(), sampling)
    assert [output.token_ids for output in outputs] == [t[:8] for t in expected("llama")]


def test_ends() -> None:
    greedy = expected("llama")[1]
    prompt = make_prompts()[1]
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    model.generation_config.eos_token_id = [greedy[4], 5000]  # read when requests come
    first = greedy.index(greedy[4])
    cases = [
        (Sampling(max_new_tokens=10), greedy[: first + 1], "eos"),
        (Sampling(max_new_tokens=10, ignore_eos=True), greedy, "length"),
        (Sampling(max_new_tokens=2), greedy[:2], "length"),
        (Sampling(max_new_tokens=10, stop=[greedy[2]]), None, "stop"),
        (Sampling(max_new_tokens=10, stop=[greedy[1:3]]), greedy[:3], "stop"),
        (Sampling(max_new_tokens=10, stop=[[96, 95, 94]]), greedy[: first + 1], "eos"),
    ]
    outputs = engine.generate([prompt] * len(cases), [sampling for sampling, _, _ in cases])
    for output, (sampling, tokens, reason) in zip(outputs, cases, strict=True):
        if tokens is None:
            tokens = greedy[: greedy.index(greedy[2]) + 1]
        assert (output.token_ids, output.finish_reason) == (tokens, reason), sampling
    assert_empty(engine)


def test_min_new_tokens_bars_the_end() -> None:
    greedy = expected("llama")[1]
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.eos_token_id = greedy[0]
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    sampling = Sampling(max_new_tokens=10, min_new_tokens=4)
    output = engine.generate([make_prompts()[1]], sampling)[0]
    assert len(output.token_ids) >= 5 and greedy[0] not in output.token_ids[:4]


@pytest.mark.parametrize("settings", [{}, {"token_budget": 4}, {"num_blocks": 24}])
def test_log_probabilities_are_the_models(settings: dict[str, Any]) -> None:
    prompts = make_prompts()[:3]
    engine = make_engine(**settings)
    outputs = engine.generate(prompts, Sampling(max_new_tokens=5, temperature=0.9, logprobs=3))
    for prompt, output in zip(prompts, outputs, strict=True):
        logs = next_logs(prompt + output.token_ids)[len(prompt) - 1 : -1]
        assert output.logprobs is not None and len(output.logprobs) == 5
        for row, token, numbers in zip(logs, output.token_ids, output.logprobs, strict=True):
            assert set(numbers) == {token, *row.topk(3).indices.tolist()}
            for other, number in numbers.items():
                assert number == pytest.approx(float(row[other]), abs=1e-4)
    none = engine.generate(prompts[:1], Sampling(max_new_tokens=2, logprobs=0))[0]
    assert none.logprobs is not None and [len(numbers) for numbers in none.logprobs] == [1, 1]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "settings", [{}, {"token_budget": 3}, {"prefix_cache": False}, {"num_blocks": 30}]
)
def test_scores_are_the_models(family: str, settings: dict[str, Any]) -> None:
    prompt = random_prompt(21, 5)
    completions = [random_prompt(n, 50 + n) for n in (1, 4, 13)]
    completions.append(completions[1])
    engine = make_engine(family, **settings)
    scores = engine.score(prompt, completions, top_k=4)
    for completion, score in zip(completions, scores, strict=True):
        with torch.no_grad():
            text = torch.tensor([prompt + completion], device=DEVICE)
            logs = make_model(family)(text).logits[0, len(prompt) - 1 : -1].cpu().log_softmax(-1)
        wanted = logs.gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), wanted, rtol=0, atol=2e-4)
        assert score.total == pytest.approx(float(wanted.sum()), abs=1e-3)
        assert len(score.top) == len(completion)
        for row, top in zip(logs, score.top, strict=True):
            assert list(top) == row.topk(4).indices.tolist()
    assert_empty(engine)


def test_scores_of_long_completions_are_taken_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    whole = engine.score(PROMPT, [PROMPT * 3, [5]], top_k=2)
    monkeypatch.setattr("pykvcache.engine.loop.SLICE_BYTES", 5 * VOCAB * 4)
    sliced = engine.score(PROMPT, [PROMPT * 3, [5]], top_k=2)
    for a, b in zip(whole, sliced, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert [list(top) for top in a.top] == [list(top) for top in b.top]
    assert len(sliced[0].logprobs) == len(sliced[0].top) == 27


@pytest.mark.parametrize("length", [1, 2, 4, 5, 13])
def test_scoring_again_finds_everything(length: int) -> None:
    engine, prompt = make_engine(), random_prompt(length, 77)
    first = engine.score(prompt, [[9, 8, 7], [6]])
    engine.generate([prompt], max_new_tokens=4)
    again = engine.score(prompt, [[9, 8, 7], [6]])
    for one, other in zip(first, again, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_scores_fit_the_smallest_pool_that_holds_one() -> None:
    engine = make_engine(num_blocks=4, head_room=0.0)
    completions = [random_prompt(n, n) for n in (5, 6, 5)]
    prompt = random_prompt(11, 3)
    scores = engine.score(prompt, completions)
    wanted = make_engine().score(prompt, completions)
    for one, other in zip(scores, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert_empty(engine)


def test_scores_beside_a_request_whose_prompt_looks_like_a_number() -> None:
    engine = make_engine()
    handle = engine.submit([2], max_new_tokens=4)
    assert len(engine.score([5, 6, 7], [[9, 4]])[0].logprobs) == 2
    assert len(handle.result()[0].token_ids) == 4


def test_scores_compute_the_prompt_once() -> None:
    engine = make_engine(prefix_cache=False)
    prompt, completions = random_prompt(40, 1), [random_prompt(3, n) for n in range(10)]
    engine.score(prompt, completions)
    assert engine._loop.meter._tokens == 39 + 10 * 3
    single = engine.score([5], [[6, 7]])[0]  # no prompt before the last token
    assert single.logprobs[0] == pytest.approx(float(next_logs([5])[0, 6]), abs=1e-4)


def test_streams_yield_every_token_once() -> None:
    engine = make_engine()
    received: dict[int, list[int]] = {}
    ends: dict[int, Any] = {}
    events = list(engine.stream(make_prompts(), max_new_tokens=10))
    for event in events:
        assert event.token_id is not None and event.prompt_index not in ends
        received.setdefault(event.prompt_index, []).append(event.token_id)
        if event.output is not None:
            ends[event.prompt_index] = event.output
    assert [received[i] for i in range(len(received))] == expected("llama")
    assert all(ends[i].token_ids == tokens for i, tokens in received.items())
    assert len({event.prompt_index for event in events[:10]}) > 1  # not one after the other
    assert_empty(engine)


def test_streams_lose_nothing_when_others_run_the_engine() -> None:
    engine = make_engine()
    stream = engine.stream(make_prompts()[:2], max_new_tokens=10)
    first = next(stream).token_id
    engine.generate(make_prompts()[2:5], max_new_tokens=10)
    tokens = [event.token_id for event in stream if event.prompt_index == 0]
    assert [first, *tokens] == expected("llama")[0]
    unread = engine.stream(make_prompts()[:2], max_new_tokens=4)
    assert engine.stats().waiting == 2
    del unread
    assert_empty(engine)


def test_leaving_a_stream_cancels_the_rest() -> None:
    engine = make_engine()
    for _ in engine.stream(make_prompts(), max_new_tokens=10):
        break
    assert_empty(engine)


def test_callbacks_hear_tokens_and_cancellation() -> None:
    engine = make_engine()
    heard: list[Event] = []
    handle = engine.submit(PROMPT, max_new_tokens=10, on_token=heard.append)
    for _ in range(3):
        engine.step()
    handle.cancel()
    handle.cancel()
    assert handle.done and handle.result()[0].finish_reason == "cancelled"
    tokens = [event.token_id for event in heard]
    assert tokens[:-1] == handle.outputs[0].token_ids and tokens[-1] is None
    assert heard[-1].output is handle.outputs[0]
    assert_empty(engine)


def test_many_samples_of_one_prompt_take_turns_in_the_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their first tokens all come from the same logits, which are repeated a slice at a time."""
    engine = make_engine(num_blocks=600, max_running=8)
    sampler = engine._loop._sampler
    original, rows = sampler.choose, []

    def counting(logits: torch.Tensor, *args: Any) -> Any:
        rows.append(len(logits))
        return original(logits, *args)

    sampler.choose = counting  # type: ignore[method-assign]
    monkeypatch.setattr(engine._loop, "set_ends", lambda *args: None)  # keeps this sampler
    wanted = make_engine(num_blocks=600).generate([PROMPT], Sampling(**SAMPLED, n=50, seed=3))
    monkeypatch.setattr("pykvcache.engine.loop.SLICE_BYTES", 12 * VOCAB * 4)
    outputs = engine.generate([PROMPT], Sampling(**SAMPLED, n=50, seed=3))
    assert rows[:5] == [12, 12, 12, 12, 2] and max(rows[5:]) <= 8
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]
    assert_empty(engine)
