"""The replay agrees with a second simulator, replay_model.py, that shares no code with it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_model import SHARES, Simulation

from pykvcache.bench.replay.cases import CONTIGUOUS, Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.rules import BUDDY_RESTS, ORDERS, PREEMPTIONS, VICTIMS, Rules
from pykvcache.bench.replay.totals import BESIDE, KEYS, Result
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.traces import Request

CASES = [*map(Case, CONTIGUOUS), *(Case("paged", size) for size in (1, 5, 16, 64, 256))]
TRACES = ("azure-conv", "azure-code", "sharegpt", "sharegpt-like")


def short(trace: str, count: int, divisor: int, longest: int) -> list[Request]:
    """Requests of a trace, shortened, one every 50 ms."""
    found = []
    for i, request in enumerate(Workload(trace, limit=count)):
        prompt = min(max(1, request.prompt // divisor), longest - 1)
        output = min(max(1, request.output // divisor), longest - prompt)
        found.append(Request(prompt, output, 0.05 * i))
    return found


def as_rows(requests: list[Request], saturated: bool) -> list[tuple[int, int, float]]:
    return [(r.prompt, r.output, 0.0 if saturated else r.arrival or 0.0) for r in requests]


def check_against_model(
    requests: list[Request], case: Case, slots: int, max_len: int, rules: Rules
) -> Result:
    cost = rules.cost
    model = Simulation(
        as_rows(requests, rules.saturated),
        case.policy,
        slots,
        max_len,
        case.block_size or 0,
        rules.head_room,
        (cost.base, cost.per_kv_token, cost.per_prefill_token),
        rules.victim,
        cost.per_swapped_token if rules.preemption == "swap" else None,
        rules.order == "shortest",
        rules.buddy_rest == "used",
    ).run()
    result = run_case(case, requests, slots, max_len, rules)
    assert result.requests == len(requests)
    assert result.throughput == pytest.approx(model.throughput)
    assert result.seconds.total == pytest.approx(model.seconds)
    assert result.peak_batch == model.peak
    assert (result.preemptions, result.recomputed_tokens) == (model.preemptions, model.recomputed)
    assert result.waiting.seconds == pytest.approx(model.waited)
    if model.waited:
        assert result.shares() == pytest.approx(model.shares(), abs=1e-4)
        assert result.mean_batch == pytest.approx(model.mean_batch)
    return result


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_agrees_with_a_simulator_of_its_own(trace: str, case: Case) -> None:
    requests = short(trace, 150, 8, 500)
    check_against_model(requests, case, 2500, 500, Rules())


@pytest.mark.parametrize("order", ["fcfs", "shortest"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("victim", ["newest", "cheapest"])
@pytest.mark.parametrize("saturated", [True, False])
def test_agrees_under_preemption_and_arrivals(
    saturated: bool, victim: str, preemption: str, order: str
) -> None:
    requests = short("sharegpt-like", 200, 4, 300)
    rules = Rules(
        saturated=saturated, head_room=0.0, victim=victim, preemption=preemption, order=order
    )
    result = check_against_model(requests, Case("paged", 4), 1000, 300, rules)
    assert result.preemptions > 10


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=25),
    st.sampled_from(CASES),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(VICTIMS),
    st.sampled_from(PREEMPTIONS),
    st.sampled_from(ORDERS),
    st.sampled_from(BUDDY_RESTS),
    st.sampled_from([320, 309]),
)
def test_agrees_on_anything(
    lengths,
    case: Case,
    head_room: float,
    saturated: bool,
    gap: int,
    victim: str,
    preemption: str,
    order: str,
    buddy_rest: str,
    slots: int,
) -> None:
    # No arrival at the very end of a step: which of the two comes first is up to rounding.
    requests = [Request(p, o, i * gap * 0.0100037) for i, (p, o) in enumerate(lengths)]
    cost = StepCost(4e-3, 1e-5, 1e-4, 2e-5)
    rules = Rules(cost, saturated, head_room, victim, preemption, order, buddy_rest)
    check_against_model(requests, case, slots, 80, rules)


@pytest.mark.parametrize("buddy_rest", BUDDY_RESTS)
@pytest.mark.parametrize("policy", ["power-of-two", "oracle-buddy"])
def test_buddies_in_a_budget_that_is_no_power_of_two(policy: str, buddy_rest: str) -> None:
    """Top regions of 512: 988 slots have one, and a rest of 476 in which 400 would have a place."""
    rules, external = Rules(buddy_rest=buddy_rest), {}
    for slots, max_len in ((988, 400), (988, 480), (2500, 500)):
        requests = short("azure-conv", 100, 8, max_len)
        result = check_against_model(requests, Case(policy), slots, max_len, rules)
        external[slots, max_len] = result.shares()["external"]
    assert (external[988, 480] > 48) == (buddy_rest == "lost")
    assert external[988, 400] < 48


def test_rows_have_exactly_the_keys_and_sum_to_100() -> None:
    requests = short("azure-conv", 60, 8, 500)
    for case in [*CASES, Case("padded")]:
        row = run_case(case, requests, 2500, 500, Rules()).to_json()
        assert tuple(row) == (*KEYS, *BESIDE)
        assert sum(row[name] for name in SHARES) == 100
        assert all(row[name] >= 0 for name in SHARES)
