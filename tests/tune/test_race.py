"""The race between candidates and what it maximises."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from pykvcache.bench.replay.cases import PAGED, Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.tune import plan
from pykvcache.bench.tune.objective import Demand, Objective
from pykvcache.bench.tune.search import (
    BOUNDED_ROUNDS,
    DEFAULT,
    MIN_ROUNDS,
    Candidate,
    Launch,
    Race,
)

SIZES = (4, 16, 64, 256)
GRID = [DEFAULT, *(Launch(tile, stages) for tile in (16, 32, 64) for stages in (1, 2, 3))]


class FakeDevice:
    """Times of candidates that are known, with noise that hits a whole round, and a clock."""

    def __init__(self, seconds: dict[Candidate, float], noise: float = 0.05) -> None:
        self.seconds, self.noise, self.now, self.calls = seconds, noise, 0.0, 0
        self.random = random.Random(1)

    def sample(self, candidate: Candidate) -> float:
        self.calls += 1
        slow = 4.0 if self.random.random() < 0.05 else 1.0  # something else ran
        drift = 1.5 if int(self.now) % 7 == 3 else 1.0
        time = self.seconds[candidate] * slow * drift
        time *= 1 + self.noise * self.random.gauss(0, 1) ** 2
        self.now += 0.01
        return time

    def clock(self) -> float:
        return self.now


def objective(batch: dict[int, float], base: float = 1.0) -> Objective:
    """Memory lets so many rows run; each has 1,000 cached tokens."""
    demands = {
        size: Demand(size, 1000.0 / rows, 1e6, 0.0, 1000, 90.0, 0.1 * size, rows)
        for size, rows in batch.items()
    }
    return Objective(base, 1, demands, dict.fromkeys(batch, 0.0))


def race(times: dict, goal: Objective, seconds: float = 2000, **options: object) -> tuple:
    device = FakeDevice(times)
    runner = Race(times, device.sample, goal.value, goal.waste, **options)  # type: ignore[arg-type]
    return runner.run(seconds=seconds, clock=device.clock), device


def random_times(seed: int) -> dict[Candidate, float]:
    """Block sizes differ by 5 % or more in their best launch, launches too."""
    draw = random.Random(seed)
    bases = [1e-4 * 1.1**i for i in range(len(SIZES))]
    draw.shuffle(bases)
    times = {}
    for size, base in zip(SIZES, bases, strict=True):
        factors = [1.0 + 0.06 * i for i in range(len(GRID))]
        draw.shuffle(factors)
        times |= {Candidate(size, g): base * f for g, f in zip(GRID, factors, strict=True)}
    return times


@pytest.mark.parametrize("seed", range(8))
def test_race_finds_what_an_exhaustive_one_finds(seed: int) -> None:
    """Which is the optimum of the known times, though most candidates drop out early."""
    times = random_times(seed)
    goal = objective(dict.fromkeys(SIZES, 10.0), base=0.0)
    optimum = min(times, key=lambda c: times[c])
    quick, device = race(times, goal)
    whole, everything = race(times, goal, exhaustive=True, seconds=60)
    assert quick.settled
    assert quick.block_size == whole.block_size == optimum.block_size
    assert quick.choice == whole.choice == optimum
    assert len(quick.samples[quick.choice].times) == quick.rounds
    assert device.calls < everything.calls / 3


def test_memory_counts_beside_speed() -> None:
    """Large blocks are faster here, but so few rows fit that weights are read too often."""
    times = {Candidate(size): 1e-4 / (1 + 0.05 * i) for i, size in enumerate(SIZES)}
    fast, _ = race(times, objective(dict.fromkeys(SIZES, 50.0)))
    assert fast.block_size == 256
    scarce, _ = race(times, objective({4: 10.0, 16: 9.9, 64: 8.0, 256: 5.0}, base=10.0))
    assert scarce.block_size == 4
    assert scarce.times[4] == pytest.approx(1e-4, rel=0.1)


def test_ties_go_to_the_least_waste() -> None:
    times = {Candidate(size): 1e-4 * (1 + 0.004 * i) for i, size in enumerate(reversed(SIZES))}
    outcome, _ = race(times, objective(dict.fromkeys(SIZES, 10.0)), tolerance=0.02)
    assert set(outcome.tied) == set(SIZES) and outcome.block_size == 4
    strict, _ = race(times, objective(dict.fromkeys(SIZES, 10.0), base=0.0), tolerance=0.0005)
    assert strict.block_size == 256


@pytest.mark.parametrize(("limit", "expected"), [(2.0, 16), (0.4, 4), (7.0, 64), (0.1, 4)])
def test_of_ties_the_largest_with_little_waste(limit: float, expected: int) -> None:
    times = {Candidate(size): 1e-4 for size in (4, 16, 64)}
    times[Candidate(256)] = 1.2e-4  # would waste too much as well
    outcome, _ = race(times, objective(dict.fromkeys(SIZES, 10.0), base=0.0), little_waste=limit)
    assert outcome.tied == (4, 16, 64) and outcome.block_size == expected


def test_ties_that_change_nothing_are_not_waited_for() -> None:
    times = {Candidate(size): 1e-4 for size in (4, 16, 64)}
    times[Candidate(256)] = 1e-4 / 0.97  # for ever on the line between tied and not
    goal = objective(dict.fromkeys(SIZES, 10.0), base=0.0)
    waited, _ = race(times, goal, little_waste=100.0)
    decided, _ = race(times, goal, little_waste=2.0)
    assert decided.settled and not waited.settled and decided.rounds < waited.rounds


def test_another_launch_must_be_clearly_faster_than_the_default() -> None:
    times = {Candidate(16, DEFAULT): 1.0e-4, Candidate(16, Launch(32, 2)): 0.997e-4}
    assert race(times, objective({16: 1.0}))[0].choice.launch == DEFAULT
    times[Candidate(16, Launch(32, 2))] = 0.95e-4
    assert race(times, objective({16: 1.0}))[0].choice.launch == Launch(32, 2)


def test_race_ends_with_the_time_and_says_so() -> None:
    times = {Candidate(size): 1e-4 * (1 + 0.02 * i) for i, size in enumerate(SIZES)}
    device = FakeDevice(times, noise=3.0)
    goal = objective(dict.fromkeys(SIZES, 10.0), base=0.0)
    runner = Race(times, device.sample, goal.value, goal.waste, tolerance=0.02)
    outcome = runner.run(seconds=0.0, clock=device.clock)
    assert not outcome.settled and outcome.rounds == MIN_ROUNDS


def test_interrupted_race_keeps_what_is_known() -> None:
    times = {Candidate(size): 1e-4 for size in SIZES}
    device = FakeDevice(times)
    goal = objective(dict.fromkeys(SIZES, 10.0))

    def sample(candidate: Candidate) -> float:
        if device.calls == 100:
            raise KeyboardInterrupt
        return device.sample(candidate)

    runner = Race(times, sample, goal.value, goal.waste, exhaustive=True)
    outcome = runner.run(1000, device.clock)
    assert outcome.rounds == 25 and outcome.interrupted and not outcome.settled
    device.calls = 95
    with pytest.raises(KeyboardInterrupt):
        Race(times, sample, goal.value, goal.waste).run(1000, device.clock)


def test_bounded_race_ends_with_the_time() -> None:
    times = {Candidate(size): 1e-4 for size in SIZES}
    device = FakeDevice(times)
    goal = objective(dict.fromkeys(SIZES, 10.0))
    runner = Race(times, device.sample, goal.value, goal.waste, bounded=True)
    assert runner.run(seconds=-5.0, clock=device.clock).rounds == BOUNDED_ROUNDS


def test_objective_is_the_throughput_of_the_replay() -> None:
    """Counts times costs are what the replay itself finds with those costs."""
    workload = Workload("sharegpt-like", 2048, 300)
    cost = StepCost(3e-3, 2e-7, 5e-5)
    for size in (1, 16, 256):
        case = Case(PAGED, size)
        counted = run_case(case, workload, 20_000, 2048, Rules(StepCost()))
        timed = run_case(case, workload, 20_000, 2048, Rules(cost))
        demand = Demand.of(counted, StepCost())
        goal = Objective(cost.base, 4, {size: demand}, {size: cost.per_prefill_token / 4})
        assert goal.value(size, cost.per_kv_token / 4) == pytest.approx(timed.throughput, rel=1e-9)


@pytest.mark.parametrize(("faster", "expected"), [(128, 128), (512, 256), (1024, 0)])
def test_rows_of_prefill_are_chosen_beyond_doubt(faster: int, expected: int) -> None:
    """512 cuts the prompt as 256 does, and 1,024 as the kernel by itself."""
    draw = random.Random(3)
    items = {0: 1, 128: 8, 256: 4, 512: 4, 1024: 1}

    def prefill(block_size: int, rows: int) -> float:
        assert rows in (0, 128, 256)
        rows = faster if items[rows] == items[faster] else rows
        noise = 1 + 0.03 * draw.gauss(0, 1) ** 2
        return 1e-4 * noise * (0.8 if rows == faster else 1.0)

    bench = SimpleNamespace(prefill=prefill, prefill_items=lambda size, rows: items[rows])
    assert plan.choose_rows(bench, 16, plan.ROWS) == expected


def test_equal_rows_of_prefill_leave_the_choice_to_the_kernel() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        bench = SimpleNamespace(
            prefill_items=lambda size, rows: rows,
            prefill=lambda size, rows, draw=draw: 1e-4 * (1 + 0.03 * draw.gauss(0, 1) ** 2),
        )
        assert plan.choose_rows(bench, 16, plan.ROWS) == 0
