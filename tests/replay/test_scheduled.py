"""Replays through the engine's scheduler: all requests end, budgets hold, prefixes are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench.replay.cases import Case, run_case
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.scheduled import ScheduledReplay
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Survey, Workload
from pykvcache.bench.traces import PREFIX_BLOCK, Request
from pykvcache.engine.scheduler import Scheduler


def requests_of(trace: str, count: int) -> list[Request]:
    workload = Workload(trace, limit=count)
    found = []
    for i, request in enumerate(workload):
        prompt, output = max(1, request.prompt // 8), max(1, request.output // 8)
        found.append(Request(min(prompt, 400), min(output, 100), 0.02 * i))
    return found


def replay(requests, slots: int = 4000, block_size: int = 16, **rules) -> Result:
    return run_case(
        Case("paged", block_size), requests, slots, 500, Rules(scheduler="engine", **rules)
    )


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("trace", ["azure-conv", "sharegpt-like"])
def test_serves_everything_and_sums_to_100(trace: str, saturated: bool) -> None:
    requests = requests_of(trace, 200)
    result = replay(requests, saturated=saturated, token_budget=300)
    assert result.requests == len(requests) and result.refused == 0
    assert result.output_tokens == sum(request.output for request in requests)
    assert result.prompt_tokens == sum(request.prompt for request in requests)
    assert sum(result.shares().values()) == 100
    assert result.prefix_hit == 0


def test_agrees_with_the_common_rules_where_both_are_the_same() -> None:
    """Whole prompts that come alone: nothing to chunk, to mix or to preempt."""
    requests = [Request(50 + i, 20 + i, 10.0 * i) for i in range(10)]
    ours = replay(requests, saturated=False)
    common = run_case(Case("paged", 16), requests, 4000, 500, Rules(saturated=False))
    assert ours.shares() == pytest.approx(common.shares(), abs=1e-6)
    assert ours.seconds.total == pytest.approx(common.seconds.total)
    assert ours.throughput == pytest.approx(common.throughput)


def test_is_close_to_the_common_rules_under_load() -> None:
    requests = requests_of("azure-conv", 400)
    ours, common = replay(requests), run_case(Case("paged", 16), requests, 4000, 500, Rules())
    assert ours.shares()["live"] == pytest.approx(common.shares()["live"], abs=3)
    assert ours.waste_per_sequence == pytest.approx(7.5, rel=0.05)


def test_preempts_when_there_is_no_head_room_and_still_ends() -> None:
    requests = [Request(10, 60) for _ in range(40)]
    result = replay(requests, slots=320, head_room=0.0)
    assert result.preemptions > 0 and result.recomputed_tokens > 0
    assert result.requests == 40


def test_limits_of_the_engine_hold() -> None:
    requests = [Request(10, 60) for _ in range(40)]
    assert replay(requests, max_running=7).peak_batch == 7


@pytest.mark.parametrize("order", ["fcfs", "shortest"])
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize(("slots", "head_room"), [(4000, 0.05), (900, 0.0)])
def test_steps_taken_together_are_those_taken_one_by_one(
    slots: int, head_room: float, saturated: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of("sharegpt-like", 150)
    rules = {"saturated": saturated, "head_room": head_room, "order": order, "token_budget": 90}
    plans = []
    plan = Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda self: plans.append(0) or plan(self))
    together = replay(requests, slots, **rules)
    count = len(plans)
    monkeypatch.setattr(ScheduledReplay, "_repeat", lambda self, step: None)
    single = replay(requests, slots, **rules)
    assert count < 0.9 * (len(plans) - count)
    assert together.shares() == pytest.approx(single.shares(), abs=1e-5)
    assert together.mean_batch == pytest.approx(single.mean_batch)
    assert together.seconds.total == pytest.approx(single.seconds.total)
    assert together.preemptions == single.preemptions
    assert (together.preemptions > 0) == (head_room == 0)
    for name in ("recomputed_tokens", "peak_batch", "output_tokens", "requests"):
        assert getattr(together, name) == getattr(single, name)


def prefix_trace(path: Path) -> Workload:
    """Conversations of three turns: each prompt begins with the one before."""
    lines = []
    for turn in range(1, 4):
        for conversation in range(8):
            ids = [100 * conversation + block for block in range(turn)]
            row = {"input_length": turn * PREFIX_BLOCK, "output_length": 30, "hash_ids": ids}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return Workload(str(path))


def test_prefixes_of_earlier_turns_are_found(tmp_path: Path) -> None:
    workload = prefix_trace(tmp_path / "turns.jsonl")
    assert Survey.of(workload).has_prefixes
    result = replay(workload, slots=65536, prefix_cache=True, max_running=1, token_budget=4096)
    # Of 1, 2 and 3 blocks a turn, 0, 1 and 2 are known; turn by turn, conversation by conversation.
    assert result.hit_tokens == 8 * (0 + 1 + 2) * PREFIX_BLOCK
    assert result.prefix_hit == pytest.approx(100 * 3 / 6)
    assert sum(result.shares().values()) == 100
    without = replay(workload, slots=65536, max_running=1, token_budget=4096)
    assert result.throughput > without.throughput
    assert without.prefix_hit == 0


def test_shared_prefixes_are_live_once(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    row = {"input_length": PREFIX_BLOCK + 1, "output_length": 40, "hash_ids": [7]}
    path.write_text((json.dumps(row) + "\n") * 30)
    slots = 3 * PREFIX_BLOCK
    shared = replay(Workload(str(path)), slots=slots, prefix_cache=True)
    alone = replay(Workload(str(path)), slots=slots)
    assert alone.peak_batch == 2
    assert shared.peak_batch > 5
    assert shared.shares()["live"] <= 100
