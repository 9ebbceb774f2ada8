"""Requests with a common beginning: it is computed once, kept once, and counted once."""

from __future__ import annotations

import copy
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODER, make_model, randomize
from transformers import LlamaConfig, LlamaForCausalLM
from workload import assert_empty, make_engine, one_by_one, random_prompt

import pykvcache
from pykvcache import BlockAllocator, Sampling
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.request import Request
from pykvcache.engine.scheduler import Scheduler
from pykvcache.engine.step import Options


def computed_tokens(engine: pykvcache.Engine) -> int:
    return engine._loop.meter._tokens


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("length", [64, 59])  # the last block is full, or shared and copied
def test_samples_in_a_tight_pool_compute_their_prompt_once(length: int, prefix_cache: bool) -> None:
    engine = make_engine(block_size=16, num_blocks=20, prefix_cache=prefix_cache)
    prompt, n = random_prompt(length, 1), 60
    outputs = engine.generate([prompt], Sampling(max_new_tokens=5, n=n))
    assert [output.token_ids for output in outputs] == [
        one_by_one(make_model("llama"), prompt, 5)
    ] * n
    assert computed_tokens(engine) == length + n * 4
    assert engine.stats().preemptions == 0
    assert_empty(engine)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_completions_in_a_tight_pool_compute_their_prompt_once(prefix_cache: bool) -> None:
    engine = make_engine(block_size=16, num_blocks=12, prefix_cache=prefix_cache)
    prompt, completions = random_prompt(65, 1), [random_prompt(7, i) for i in range(50)]
    scores = engine.score(prompt, completions)
    assert computed_tokens(engine) == 64 + 50 * 7
    roomy = make_engine(num_blocks=2000).score(prompt, completions)
    for score, other in zip(scores, roomy, strict=True):
        torch.testing.assert_close(score.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)
    assert_empty(engine)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])  # two with windows
def test_prompts_whose_blocks_had_to_go_are_computed_again_once_for_all(family: str) -> None:
    engine = make_engine(family, block_size=4, num_blocks=60, prefix_cache=False, head_room=0.0)
    prompts, n = [random_prompt(30, i) for i in range(6)], 12
    outputs = engine.generate(prompts, Sampling(max_new_tokens=4, n=n))
    for i, prompt in enumerate(prompts):
        wanted = one_by_one(make_model(family), prompt, 4)
        assert [output.token_ids for output in outputs[i * n : (i + 1) * n]] == [wanted] * n
    stats = engine.stats()
    recomputed = sum(entry.tokens for entry in stats.preemption_log)
    needed = len(prompts) * (30 + n * 3)
    assert computed_tokens(engine) <= needed + len(prompts) * 30 + recomputed
    assert_empty(engine)


def test_a_preempted_sample_goes_on_from_the_blocks_of_its_prompt() -> None:
    engine = make_engine(
        block_size=4, num_blocks=60, prefix_cache=False, max_running=2, swap_memory=0
    )
    prompt = random_prompt(40, 1)
    handle = engine.submit(prompt, Sampling(max_new_tokens=6, n=4))
    for _ in range(3):
        engine.step()
    scheduler = engine._scheduler
    victim = scheduler.lanes.requests[scheduler.lanes.active[-1]]
    assert victim is not None
    tokens = int(scheduler.lanes.computed[victim.lane])
    scheduler.preempt(victim)
    assert [o.token_ids for o in handle.result()] == [
        one_by_one(make_model("llama"), prompt, 6)
    ] * 4
    assert computed_tokens(engine) == 40 + 4 * 5 + tokens - 40
    assert_empty(engine)


def test_samples_that_wait_share_nothing_stale() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100, max_running=1)
    prompt = random_prompt(20, 1)
    handle = engine.submit(prompt, Sampling(max_new_tokens=5, n=3))
    engine.step()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    engine.step()
    texts = [prompt + output.token_ids for output in handle.result()]
    for text in texts[1:]:  # all but their first tokens come from the new weights alone
        assert text[21:] == one_by_one(model, text[:21], 4)
    assert_empty(engine)


def test_a_step_takes_a_time_in_proportion_to_those_who_wait() -> None:
    """Four times as many samples in a pool of one size take about four times the bytecodes."""

    def opcodes(count: int) -> int:
        blocks = RequestBlocks(BlockAllocator(8, 4))
        scheduler = Scheduler(blocks, Options(head_room=0.0))
        prompt = np.arange(16)
        requests = [Request(prompt, 30, 0, 0) for _ in range(count)]
        for request in requests:
            scheduler.submit(request)
        executed = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal executed
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            executed += event == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            step = scheduler.plan()
            assert step is not None
            for request in [requests[0], *blocks.prompt_computed(requests[0])]:
                if request.lane < 0:
                    request.tokens = np.append(request.tokens, 1)
            scheduler.lanes.append(step.lanes, np.array([1]))
            for _ in range(12):
                step = scheduler.plan()
                assert step is not None
                scheduler.lanes.append(step.lanes[step.wanted > 0], np.ones(sum(step.wanted > 0)))
                if scheduler.steps == 3:
                    scheduler.finish(requests[0])  # nobody who runs had computed the prompt
        finally:
            sys.settrace(before)
        return executed

    assert opcodes(800) < 5 * opcodes(200)


@pytest.fixture(scope="module")
def long_model() -> Any:
    config = LlamaConfig(**{**DECODER, "max_position_embeddings": 10**6, "num_hidden_layers": 1})
    return randomize(LlamaForCausalLM(config))


def peak_bytes(run: Any) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_samples_times_prompt(long_model: Any) -> None:
    engine = pykvcache.Engine(long_model, num_blocks=300, max_running=4)
    prompt, handles = torch.arange(4000) % 90 + 3, []

    def run() -> None:
        handles.append(engine.submit(prompt, Sampling(max_new_tokens=3, n=300)))
        for _ in range(6):  # the prompt, and the first tokens of all
            engine.step()

    copies = 300 * 4000 * 8
    assert peak_bytes(run) < copies / 3
    assert all(sample.begun for sample in handles[0].samples)
    handles[0].cancel()
    assert_empty(engine)


def test_memory_does_not_grow_with_completions_times_prompt(long_model: Any) -> None:
    engine = pykvcache.Engine(long_model, num_blocks=300, max_running=4)
    prompt, completions = torch.arange(4000) % 90 + 3, [[5, 6, 7]] * 300
    assert peak_bytes(lambda: engine.score(prompt, completions)) < 300 * 4000 * 8 / 3
    assert_empty(engine)


def test_equal_prompts_find_each_other_and_other_salts_do_not() -> None:
    blocks = RequestBlocks(BlockAllocator(50, 4))
    scheduler = Scheduler(blocks, Options())
    requests = [Request(np.arange(9), 12, 0, 0, salt=salt) for salt in (0, 0, 1)]
    for request in requests:
        scheduler.submit(request)
    first, equal, other = (request.family for request in requests)
    assert first is equal and first is not other
    scheduler.plan()
    assert scheduler.num_running == 2
    assert blocks.prompt_computed(requests[0]) == [requests[1]]
    for request in requests:
        scheduler.finish(request)
    assert blocks.allocator.num_free == 50 and not blocks.kept and not blocks._families


def test_blocks_are_taken_from_families_behind_of_which_nobody_runs() -> None:
    blocks = RequestBlocks(BlockAllocator(50, 4))
    scheduler = Scheduler(blocks, Options(max_running=2))
    urgent = Request(np.arange(20), 30, 0, 0, priority=1)
    ahead, behind = ([Request(np.arange(n), n + 9, 0, 0) for _ in range(2)] for n in (8, 12))
    for request in (*ahead, *behind):
        scheduler.submit(request)
    step = scheduler.plan()
    assert step is not None and scheduler.num_running == 2
    for leader, heir in (ahead, behind):
        assert blocks.prompt_computed(leader) == [heir]
        heir.tokens = np.append(heir.tokens, 1)
    families = [ahead[0].family, behind[0].family]
    assert blocks.kept == families and [f.running for f in families if f] == [1, 1]
    scheduler.submit(urgent)
    assert scheduler._drop_kept(urgent, 1, False) == 0  # both run
    scheduler.finish(behind[0])
    assert scheduler._drop_kept(behind[1], 1, False) == 0  # its own
    assert scheduler._drop_kept(urgent, 4, False) == 0  # not enough
    assert blocks.kept == families
    assert scheduler._drop_kept(urgent, 3, False) == 3
    assert blocks.kept == families[:1]
    scheduler.finish(ahead[0])
    assert scheduler._drop_kept(behind[1], 1, True) == 2
    for request in (ahead[1], behind[1], urgent):
        scheduler.finish(request)
    assert blocks.allocator.num_free == 50 and not blocks._families
