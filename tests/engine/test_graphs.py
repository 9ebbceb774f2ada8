"""Decode steps over fixed tensors, without a GPU: a replay here runs the same forward again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_model
from torch import Tensor
from workload import NEW_TOKENS, assert_empty, expected, make_engine, make_prompts

import pykvcache
from pykvcache import Sampling
from pykvcache.engine.graphs import FIRST_PAUSE, DecodeGraphs, buckets


class Recorder:
    """Captures by keeping the function; as with a real graph, results appear in one tensor."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        result = torch.full_like(run(), torch.nan)

        def replay() -> None:
            self.replays += 1
            result.copy_(run())

        return replay, result


def with_graphs(engine: Any, record: Any, largest: int = 256) -> DecodeGraphs:
    runner = engine._runner
    groups = len(runner.cache.windows)
    runner.graphs = DecodeGraphs(runner._forward_bucket, groups, runner.device, largest, record)
    return runner.graphs


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"num_blocks": 40}, {"token_budget": 5}])
def test_same_tokens(family: str, settings: dict[str, Any]) -> None:
    engine, record = make_engine(family, **settings), Recorder()
    graphs = with_graphs(engine, record)
    for _ in range(2):
        outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
        assert [output.token_ids for output in outputs] == expected(family)
    assert record.replays > 10 and graphs.failure is None
    assert graphs.captures <= len(buckets(11))
    assert_empty(engine)


def test_growing_tables_are_captured_again() -> None:
    engine, record = make_engine(block_size=1, num_blocks=400), Recorder()
    graphs = with_graphs(engine, record)
    prompt = make_prompts()[0]
    output = engine.generate([prompt], Sampling(max_new_tokens=150))[0]
    again = make_engine(block_size=1, num_blocks=400).generate([prompt], max_new_tokens=150)[0]
    assert output.token_ids == again.token_ids
    assert graphs.captures == 3 and record.replays == 149  # 64, 128 and 256 columns


def test_graphs_of_other_weights_are_captured_again_though_nobody_waits() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    graphs = with_graphs(engine, Recorder())
    handle = engine.submit(make_prompts()[0], max_new_tokens=20)
    for _ in range(5):
        engine.step()
    assert graphs.captures == 1
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.clone()  # a graph would read memory that may be another's by now
    engine.step()
    assert graphs.captures == 2
    handle.result()
    assert graphs.captures == 2


def test_models_that_cannot_be_captured_go_on_without() -> None:
    def refuse(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    engine = make_engine()
    graphs = with_graphs(engine, refuse)
    outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert [output.token_ids for output in outputs] == expected("llama")
    assert graphs.failure == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("family", ["deepseek_v3", "diffllama", "jetmoe"])
def test_models_that_gather_keys_are_not_captured(family: str) -> None:
    """How many there are differs from step to step, and a graph has one number."""
    engine, record = make_engine(family), Recorder()
    graphs = with_graphs(engine, record)
    outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert [output.token_ids for output in outputs] == expected(family)
    assert graphs.failure is not None and "code touches keys" in graphs.failure
    assert (graphs.captures, record.replays) == (0, 0)
    assert_empty(engine)


@pytest.mark.parametrize("covered", [False, True])
def test_a_capture_that_finds_no_memory_is_tried_again_later(covered: bool) -> None:
    class Short(Recorder):
        failures = 0

        def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
            if self.failures == 2:
                return super().__call__(run)
            self.failures += 1
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if covered:  # as the end of a capture does that was left by an exception
                    raise RuntimeError("operation failed due to a previous error during capture")

    engine, record = make_engine(), Short()
    graphs = with_graphs(engine, record)
    prompt = make_prompts()[0]
    output = engine.generate([prompt], max_new_tokens=60)[0]
    assert output.token_ids == make_engine().generate([prompt], max_new_tokens=60)[0].token_ids
    assert (record.failures, graphs.failure, graphs.captures) == (2, None, 1)
    assert record.replays == 59 - 2 - FIRST_PAUSE - 2 * FIRST_PAUSE


def test_buckets_waste_little() -> None:
    sizes = buckets(300)
    assert sizes[0] == 1 and sizes[-1] >= 300 and sizes == sorted(set(sizes))
    assert all(new <= 2 * old for old, new in itertools.pairwise(sizes))
    assert all(new <= 1.5 * old for old, new in itertools.pairwise(sizes[3:]))
