"""The replay simulator: against a second one, the closed form, and published figures."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_model import SHARES, Simulation

from pykvcache.bench.replay.cases import CONTIGUOUS, Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.regions import Buddies, FirstFit, FixedSlots
from pykvcache.bench.replay.rules import BUDDY_RESTS, ORDERS, PREEMPTIONS, VICTIMS, Rules
from pykvcache.bench.replay.totals import BESIDE, KEYS, Result
from pykvcache.bench.replay.workload import Survey, Workload
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


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_waste_per_sequence_is_the_closed_form(trace: str, block_size: int) -> None:
    workload = Workload(trace, max_len=16384, limit=2500)
    result = run_case(Case("paged", block_size), workload, 65536, 16384, Rules())
    assert result.waste_per_sequence == pytest.approx((block_size - 1) / 2, rel=0.05)


def test_waste_of_rows_shorter_than_a_block_is_the_rest_of_it() -> None:
    workload = Workload("alpaca-like", max_len=250, limit=2500)
    result = run_case(Case("paged", 256), workload, 65536, 250, Rules())
    held = result.window.live / result.window.rows
    assert result.waste_per_sequence == pytest.approx(256 - held)
    assert result.waste_per_sequence > 1.3 * 127.5


def paper(case: Case, sigma: float = 1.0, trace: str = "sharegpt-like") -> Result:
    """OPT-13B in 12 GiB: Kwon et al., SOSP 2023, figure 2."""
    workload = Workload(trace, max_len=2048, limit=6000, sigma=sigma)
    return run_case(case, workload, 15_728, 2048, Rules(buddy_rest="lost"))


@pytest.mark.parametrize(
    ("case", "published"),
    [
        (Case("max-length"), 20.4),
        (Case("power-of-two"), 26.8),
        (Case("oracle-buddy"), 38.2),
        (Case("paged", 16), 96.3),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_published_useful_shares(case: Case, published: float) -> None:
    assert paper(case).shares()["live"] == pytest.approx(published, abs=4)


def test_waste_of_allocated_blocks_and_where_it_is_not_small() -> None:
    assert paper(Case("paged", 16)).waste_of_allocated < 4
    assert paper(Case("paged", 16), trace="alpaca-like").waste_of_allocated > 4


def test_rows_have_exactly_the_keys_and_sum_to_100() -> None:
    requests = short("azure-conv", 60, 8, 500)
    for case in [*CASES, Case("padded")]:
        row = run_case(case, requests, 2500, 500, Rules()).to_json()
        assert tuple(row) == (*KEYS, *BESIDE)
        assert sum(row[name] for name in SHARES) == 100
        assert all(row[name] >= 0 for name in SHARES)


def test_padded_batches_by_hand() -> None:
    """Rows of 2 + 3 and 4 + 1 tokens in 12 slots; the third does not fit and waits."""
    requests = [Request(2, 3), Request(4, 1), Request(6, 1)]
    cost = StepCost(1.0, 0.0, 0.0)
    result = run_case(Case("padded"), requests, 12, 8, Rules(cost))
    # Steps 0 to 2 hold 2 x 4, 2 x 5 and 2 x 6 slots; live 2 + 4, then 3, then 4.
    assert result.shares() == pytest.approx(
        {
            "live": 100 * 13 / 36,
            "reserved": 0,
            "internal": 100 * 17 / 36,
            "rounding": 0,
            "external": 100 * 6 / 36,
        },
        abs=1e-4,
    )
    assert result.seconds.total == 4
    assert (result.peak_batch, result.output_tokens, result.throughput) == (2, 5, 1.25)
    assert result.mean_batch == pytest.approx(4 / 3)


def test_shares_are_of_used_memory_when_nobody_waits() -> None:
    requests = [Request(10, 6, 100.0 * i) for i in range(3)]
    result = run_case(Case("paged", 16), requests, 1600, 16, Rules(saturated=False))
    shares = result.shares()
    assert result.waiting.seconds == 0
    assert shares["external"] == 0 and shares["live"] > 60
    assert result.seconds.idle > 190


def test_what_cannot_be_held_is_refused_and_counted() -> None:
    requests = [Request(700, 100), Request(10, 10)]
    result = run_case(Case("paged", 300), requests, 1000, 800, Rules())
    assert (result.refused, result.requests) == (0, 2)
    result = run_case(Case("paged", 400), requests, 799, 799, Rules())
    assert (result.refused, result.requests) == (1, 1)
    result = run_case(Case("oracle-buddy"), requests, 1000, 800, Rules())
    assert (result.refused, result.requests) == (1, 1)


@pytest.mark.parametrize(
    "make", [lambda: FixedSlots(96, 20), lambda: FirstFit(96), lambda: Buddies(96, 20, False)]
)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_regions_never_overlap_and_all_come_back(make, data: st.DataObject) -> None:
    regions = make()
    taken: dict[int, int] = {}
    for size in data.draw(st.lists(st.integers(1, 20), max_size=40)):
        if taken and data.draw(st.booleans()):
            address = data.draw(st.sampled_from(sorted(taken)))
            regions.give(address, taken.pop(address))
        address = regions.take(size)
        if address is not None:
            taken[address] = size
            spans = sorted((a, a + regions.granted(s)) for a, s in taken.items())
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            assert spans[-1][1] <= 96
    for address, size in taken.items():
        regions.give(address, size)
    largest = regions.largest()
    assert sum(1 for _ in iter(lambda: regions.take(largest), None)) == 96 // largest


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


@given(st.integers(1, 300), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_buddies_use_the_whole_memory(slots: int, longest: int) -> None:
    """Single slots fill it, and when they are given back, its first regions are there again."""
    regions, fresh = Buddies(slots, longest, True), Buddies(slots, longest, True)
    taken = [regions.take(1) for _ in range(slots)]
    assert sorted(taken) == list(range(slots)) and regions.take(1) is None
    for address in taken:
        regions.give(address, 1)
    size = fresh.largest()
    while size:
        address = fresh.take(size)
        assert regions.take(size) == address
        size = size // 2 if address is None else size


def test_workload_cuts_what_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n3,4\n100,5\n6,90\n0,0\n")
    assert list(Workload(str(path), max_len=10)) == [
        Request(3, 4),
        Request(9, 1),
        Request(6, 4),
        Request(1, 1),
    ]
    survey = Survey.of(Workload(str(path), max_len=10))
    assert (survey.count, survey.longest, survey.cut) == (4, 105, 2)
    assert not survey.has_arrivals


def test_synthetic_requests_have_the_means_and_a_common_beginning() -> None:
    survey = Survey.of(Workload("sharegpt-like", limit=40_000))
    assert survey.prompt == pytest.approx(161, rel=0.03)
    assert survey.output == pytest.approx(338, rel=0.03)
    assert list(Workload("alpaca-like", limit=70)) == list(Workload("alpaca-like", limit=5000))[:70]
    assert list(Workload("alpaca-like", limit=70)) != list(
        Workload("alpaca-like", limit=70, seed=1)
    )


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    generator = random.Random(0)
    peaks = []
    for count in (300, 3000):
        path = tmp_path / f"{count}.csv"
        lines = [f"{generator.randint(1, 50)},{generator.randint(1, 50)}" for _ in range(count)]
        path.write_text("\n".join(["input_length,output_length", *lines]) + "\n")
        workload = Workload(str(path))
        run_case(Case("paged", 16), workload, 1024, 100, Rules())
        tracemalloc.start()
        run_case(Case("paged", 16), workload, 1024, 100, Rules())
        run_case(Case("oracle-buddy"), workload, 1024, 100, Rules())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000
