"""What `Engine.stats` counts."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from workload import make_engine, make_prompts, random_prompt

from pykvcache import Sampling


def test_hit_rate_is_of_prompts_that_were_looked_up() -> None:
    engine = make_engine(max_running=1)
    prompt = random_prompt(20, 1)
    engine.generate([prompt], max_new_tokens=2)
    engine.reset_stats()
    engine.generate([prompt], max_new_tokens=2)
    assert engine.stats().hit_rate == 19 / 20
    running = engine.submit(prompt, max_new_tokens=8)
    engine.step()
    waiting = [engine.submit(random_prompt(30, n), max_new_tokens=2) for n in range(9)]
    for handle in [running, *waiting]:
        handle.cancel()
    stats = engine.stats()
    assert (stats.hit_rate, stats.prompt_tokens, stats.cancelled) == (19 / 20, 40, 10)
    assert stats.queue_time.max == pytest.approx(running.outputs[0].queued, abs=1)


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_samples_of_one_prompt_compute_it_once(new_tokens: int) -> None:
    engine = make_engine(prefix_cache=False)
    prompt = random_prompt(20, 1)
    outputs = engine.generate([prompt], Sampling(max_new_tokens=new_tokens, n=4))
    assert [output.cached_tokens for output in outputs] == [0, 20, 20, 20]
    assert engine.stats().hit_rate == 60 / 80


def test_the_rate_of_tokens_is_that_of_the_steps_it_is_taken_over() -> None:
    engine = make_engine()
    handles: list[Any] = [
        engine.submit(make_prompts()[0], max_new_tokens=40),
        engine.submit(make_prompts()[1], max_new_tokens=40, on_token=lambda event: None),
        engine.submit(make_prompts()[2], Sampling(max_new_tokens=40, n=3, temperature=1.0)),
    ]
    begun = time.perf_counter()
    for _ in range(38):
        engine.step()
    seconds = time.perf_counter() - begun
    stats = engine.stats()
    busy = stats.step_time.mean * stats.steps
    assert stats.tokens_per_second == pytest.approx(5 * 38 / busy)
    assert 0 < busy < seconds
    engine.reset_stats()
    engine.step()
    stats = engine.stats()
    assert stats.tokens_per_second == pytest.approx(5 / stats.step_time.mean)
    assert all(handle.result() for handle in handles)


@pytest.mark.parametrize("plain", [True, False])
def test_every_gap_between_tokens_counts(plain: bool) -> None:
    engine = make_engine()
    handle = engine.submit(
        make_prompts()[0], max_new_tokens=11, on_token=None if plain else lambda event: None
    )
    for _ in range(5):
        engine.step()
    time.sleep(0.5)
    engine._scheduler.preempt(handle.samples[0].request)  # its last token is not forgotten
    handle.result()
    between = engine.stats().time_between_tokens
    assert between.max >= 0.5
    assert between.p50 < 0.4
    assert between.mean == pytest.approx(
        (handle.outputs[0].total - handle.outputs[0].first_token) / 10, rel=0.1
    )


def test_gaps_are_those_of_the_newest_tokens() -> None:
    meter = make_engine()._loop.meter
    meter.generated(4, np.full(99_999, 7.0))
    meter.generated(4, np.array([1.0, 2.0, 3.0]))
    kept = np.sort(meter._between)
    assert kept[:4].tolist() == [1, 2, 3, 7] and len(kept) == 100_000
    meter.generated(4, np.full(99_998, 5.0))
    assert sorted(set(meter._between)) == [2, 3, 5]


def test_scores_count() -> None:
    engine = make_engine()
    prompt = random_prompt(40, 1)
    for _ in range(2):
        engine.score(prompt, [[5, 6], [7]])
    stats = engine.stats()
    assert (stats.scored, stats.prompt_tokens, stats.finished) == (4, 160, 0)
    assert stats.hit_rate == (0 + 39 + 39 + 39) / 160
