"""Failures leave the engine usable and lose no block; bad arguments change nothing."""

from __future__ import annotations

import copy
import gc
import os
import resource
import signal
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from families import make_model
from workload import (
    NEW_TOKENS,
    assert_empty,
    expected,
    make_engine,
    make_prompts,
    one_by_one,
    random_prompt,
)

import pykvcache
from pykvcache import Sampling
from pykvcache.engine.graphs import DecodeGraphs


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 3, 8])
@pytest.mark.parametrize("place", ["model", "sampler", "copy", "record"])
def test_errors_anywhere_in_a_step(
    error: type[BaseException], call: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(token_budget=24, cuda_graphs=False)
    owner, name = {
        "model": (engine._runner, "_forward"),
        "sampler": (engine._loop._sampler, "choose"),
        "copy": (engine._runner, "copy_blocks"),
        "record": (engine._blocks, "record"),
    }[place]
    original, calls = getattr(owner, name), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 1:
            raise error("on purpose")
        return original(*args)

    monkeypatch.setattr(owner, name, failing)
    handles = [engine.submit(p, max_new_tokens=NEW_TOKENS) for p in make_prompts()]
    failed = 0
    while not all(handle.done for handle in handles):
        try:
            engine.step()
        except error:
            failed += 1
    assert failed == (calls[0] > call)
    assert [handle.outputs[0].token_ids for handle in handles] == expected("llama")
    assert_empty(engine)


@pytest.mark.parametrize("call", [0, 2, 5])
def test_generate_and_score_leave_nothing_behind(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(token_budget=8)
    original, calls = engine._runner._forward, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % (call + 1) == 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(engine._runner, "_forward", failing)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert_empty(engine)
    with pytest.raises(KeyboardInterrupt):
        engine.score(random_prompt(40, 1), make_prompts())
    assert_empty(engine)
    monkeypatch.undo()
    outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert [output.token_ids for output in outputs] == expected("llama")


def test_errors_in_callbacks_come_out_and_harm_nobody() -> None:
    engine = make_engine()
    heard: list[int | None] = []

    def complain(event: Any) -> None:
        raise ValueError("from the callback")

    first = engine.submit(make_prompts()[0], max_new_tokens=3, on_token=complain)
    second = engine.submit(
        make_prompts()[1], max_new_tokens=3, on_token=lambda event: heard.append(event.token_id)
    )
    errors = 0
    while not (first.done and second.done):
        try:
            engine.step()
        except ValueError:
            errors += 1
    assert errors == 3 and heard == expected("llama")[1][:3]
    assert first.outputs[0].token_ids == expected("llama")[0][:3]
    assert_empty(engine)


def test_ten_thousand_short_requests_take_no_more_memory() -> None:
    engine = make_engine(num_blocks=300, max_running=64)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> None:
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
        engine.generate(prompts, Sampling(max_new_tokens=1))

    some(2000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objects = len(gc.get_objects())
    for _ in range(8):
        some(1000)
    gc.collect()
    assert len(gc.get_objects()) < objects + 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000  # KiB
    assert not engine._blocks._families
    assert_empty(engine)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_pool_goes_with_its_engine(graphs: bool) -> None:
    engine = make_engine()
    if graphs:
        runner = engine._runner
        runner.graphs = DecodeGraphs(
            runner._forward_bucket, 1, runner.device, 8, lambda run: (run, run())
        )
    engine.generate(make_prompts(), max_new_tokens=3)
    if runner_graphs := engine._runner.graphs:
        assert runner_graphs.captures
        runner_graphs.clear()  # this recorder keeps what it recorded
    pool = weakref.ref(engine.pool)
    gc.collect()
    gc.disable()
    try:
        del engine, runner_graphs
        if graphs:
            del runner
        assert pool() is None
    finally:
        gc.enable()


def test_memory_is_a_bound() -> None:
    for family in ("llama", "gemma3", "llama4"):
        engine = make_engine(family, num_blocks=None, memory="64KiB")
        assert 0 < engine.pool.allocated_bytes <= 64 * 1024
        assert engine.pool.allocated_bytes + engine.pool.block_bytes > 64 * 1024
        engine.generate(make_prompts()[:3], max_new_tokens=4)


def test_nobody_starves() -> None:
    """A stream of newer and more important requests cannot hold back an old one for ever."""
    engine = make_engine(num_blocks=12, max_running=2, token_budget=8)
    object.__setattr__(engine._scheduler.options, "patience", 5)
    old = engine.submit(make_prompts()[0], max_new_tokens=4, priority=0)
    for count in range(200):
        engine.submit(random_prompt(6, count), max_new_tokens=4, priority=3)
        engine.submit(random_prompt(6, count + 500), max_new_tokens=4, priority=3)
        engine.step()
        if old.done:
            break
    assert old.done
    assert old.outputs[0].token_ids == expected("llama")[0][:4]


def test_priority_comes_first() -> None:
    engine = make_engine(max_running=1)
    low = engine.submit(make_prompts()[0], max_new_tokens=2)
    high = engine.submit(make_prompts()[1], max_new_tokens=2, priority=1)
    while not high.done:
        engine.step()
    assert not low.done
    assert low.result()[0].token_ids == expected("llama")[0][:2]


def test_an_interrupt_inside_the_planner_or_the_end_of_a_request_loses_nothing() -> None:
    """A real SIGINT; it is handled when the requests are in order again."""
    for name in ("plan", "finish"):
        engine = make_engine()
        scheduler = engine._scheduler
        original = getattr(scheduler, name)

        def interrupting(*args: Any, original: Any = original) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return original(*args)

        setattr(scheduler, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
        delattr(scheduler, name)
        assert_empty(engine)
        outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
        assert [output.token_ids for output in outputs] == expected("llama")


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_tiny_pools_serve_what_fits(num_blocks: int) -> None:
    engine = make_engine(num_blocks=num_blocks)
    prompt = make_prompts()[2]
    output = engine.generate([prompt], max_new_tokens=min(4 * num_blocks, NEW_TOKENS))[0]
    assert output.token_ids == expected("llama")[2][: 4 * num_blocks]


def test_salts_keep_prefixes_apart() -> None:
    engine = make_engine()
    prompt = make_prompts()[4]
    cached = [
        engine.generate([prompt], max_new_tokens=2, salt=salt)[0].cached_tokens
        for salt in (0, 0, 1, 1, 2, 0)
    ]
    most = len(prompt) - 1
    assert cached == [0, most, 0, most, 0, most]


@pytest.mark.parametrize("family", ["gemma2", "mistral", "llama"])
def test_two_engines_share_a_model_in_two_threads(family: str) -> None:
    model = copy.deepcopy(make_model(family))
    if family != "mistral":
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    prompts, wanted = make_prompts()[:5], expected(family)[:5]
    failures: list[object] = []

    def work() -> None:
        try:
            engine = pykvcache.Engine(model, num_blocks=200, block_size=4, token_budget=16)
            while time.perf_counter() < end:
                outputs = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
                assert [output.token_ids for output in outputs] == wanted
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        end = time.perf_counter() + 0.7
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        while time.perf_counter() < end:  # the model stays usable on its own
            assert one_by_one(model, prompts[0]) == wanted[0]
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert model.config._attn_implementation == before
