"""A tuning run: replay the trace, measure, decide."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pykvcache import ops
from pykvcache.bench import peaks
from pykvcache.bench.replay.cases import PAGED, Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.rows import Rows
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.timing import interleave
from pykvcache.bench.tune import screen
from pykvcache.bench.tune.measure import Bench, elapsed, launches_for, section_name, table_of
from pykvcache.bench.tune.objective import Demand, Objective
from pykvcache.bench.tune.search import LITTLE_WASTE, Candidate, Outcome, Race, Samples
from pykvcache.bench.tune.shapes import Shape

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PREFILL_ROUNDS = 7
ROWS_ROUNDS = 15
ROWS = (0, 128, 256, 512, 1024)
ROWS_MARGIN = 0.01
KEPT_LENGTHS = 20_000

Advance = Callable[..., object]


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    shape: Shape
    workload: Workload
    memory: str
    block_sizes: Sequence[int] = BLOCK_SIZES
    seconds: float = 60.0
    tolerance: float = 0.03
    little_waste: float = LITTLE_WASTE
    step_seconds: float | None = None
    device: str = "cpu"
    exhaustive: bool = False
    backend: str = "auto"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C before the kernels could be compared; `demands` is what the replay had found."""

    def __init__(self, demands: Mapping[int, Demand]) -> None:
        super().__init__()
        self.demands = demands


@dataclass(frozen=True)
class Tuning:
    """What was found. `rows`: query rows of the general CPU kernel, 0 = its own choice.

    interrupted: by Ctrl-C; what was chosen is what was best until then.
    backend: whose kernels were measured.
    """

    request: Request
    objective: Objective
    outcome: Outcome
    rows: int
    lengths: Sequence[int]
    bandwidth: float
    table: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False
    backend: str = "cpu"

    def to_json(self) -> list[dict[str, Any]]:
        """A row a block size."""
        return [self._row(size) for size in sorted(self.outcome.best)]

    def _row(self, size: int) -> dict[str, Any]:
        outcome, demand = self.outcome, self.objective.demands[size]
        candidate = outcome.best[size]
        times = np.array(outcome.samples[candidate].times)
        decode = outcome.times[size]
        times *= decode / np.median(times)  # of a candidate that dropped out: as if it had stayed
        return {
            "block_size": size,
            "chosen": size == outcome.block_size,
            "interrupted": self.interrupted,
            "tied": size in outcome.tied,
            "launch": candidate.launch.entry(),
            "decode_ns_per_token": 1e9 * decode,
            "decode_p10": 1e9 * float(np.quantile(times, 0.1)),
            "decode_p90": 1e9 * float(np.quantile(times, 0.9)),
            "samples": len(times),
            "decode_gb_per_second": self.request.shape.token_bytes / decode / 1e9,
            "prefill_ns_per_token": 1e9 * self.objective.prefill[size],
            "live": demand.live,
            "waste": demand.waste,
            "mean_batch": demand.mean_batch,
            "averaged_over": "the whole replay",
            "throughput": self.objective.value(size, decode),
        }


def progress_steps(request: Request) -> int:
    """Seconds of the race, and a step for each replay."""
    return round(request.seconds) + len(request.block_sizes)


def tune(request: Request, advance: Advance = lambda *a, **k: None) -> Tuning:
    """Measure and decide; `advance(steps, title=...)` hears of each of progress_steps(request).

    Raises:
        ValueError: an argument; one line. WrongResult: a kernel is wrong; nothing was timed.
        Interrupted: Ctrl-C before MIN_ROUNDS of the race; after them it only ends early.
    """
    demands: dict[int, Demand] = {}
    try:
        return _tune(request, demands, advance)
    except KeyboardInterrupt:
        raise Interrupted(demands) from None


def _tune(request: Request, demands: dict[int, Demand], advance: Advance) -> Tuning:
    lengths, prompt = replay_demands(request, demands, advance)
    device = torch.device(request.device)
    backend = ops.table(request.backend, device.type).backend
    sizes = sorted(request.block_sizes)
    bench = Bench(request.shape, lengths, prompt, request.device, backend, max(sizes))
    began = time.perf_counter()
    on_gpu = device.type != "cpu"
    try:
        advance(0, title="checking")
        rows = (0,) if on_gpu else ROWS
        candidates = choose_candidates(request, bench, sizes, rows)
        bandwidth = read_bandwidth(device)
        base = step_seconds(request, bandwidth)
        prefill = measure_prefill(bench, sizes)
        objective = Objective(base, request.shape.layers, demands, prefill)
        race = Race(
            candidates, bench.decode, objective.value, objective.waste, request.tolerance,
            request.little_waste, request.exhaustive, bounded=on_gpu,
        )  # fmt: skip
        outcome = race.run(
            request.seconds - (time.perf_counter() - began if on_gpu else 0),
            time.perf_counter,
            lambda seconds: advance(seconds, title=f"{len(race.alive)} candidates"),
        )
        found_rows, interrupted = 0, outcome.interrupted
        if not interrupted:
            try:
                found_rows = choose_rows(bench, outcome.block_size, rows)
            except KeyboardInterrupt:
                interrupted = True
    finally:
        if backend != "cuda":
            restore_launches(device)
    table = {}
    if backend != "cuda":
        table = table_of(request.shape, outcome.choice.launch, found_rows, section_name(device))
    return Tuning(
        request, objective, outcome, found_rows, bench.lengths, bandwidth, table, interrupted,
        backend,
    )  # fmt: skip


def choose_candidates(
    request: Request, bench: Bench, sizes: Sequence[int], rows: Sequence[int]
) -> list[Candidate]:
    """Who races: the whole grid on a CPU, on a GPU what can be compiled in the time.

    Raises:
        WrongResult: a kernel is wrong.
    """
    device = bench.device
    if bench.backend == "cuda":  # its kernels choose their launches themselves
        candidates = [Candidate(size) for size in sizes]
        bench.check(candidates, rows)
        return candidates
    grid = launches_for(device, torch.get_num_threads())
    if device.type == "cpu":
        candidates = [Candidate(size, launch) for size in sizes for launch in grid]
        bench.check(candidates[:: max(1, len(candidates) // 60)], rows)
        return candidates
    limit = screen.shared_memory(device)
    grid = [launch for launch in grid if screen.fits_shared_memory(request.shape, launch, limit)]
    return screen.screen(bench, sizes, grid, request.seconds, time.perf_counter)


def restore_launches(device: torch.device) -> None:
    """Back to the user's table."""
    from pykvcache import launch_table

    if device.type == "cpu":
        launch_table.use_user_table_on_cpu()
    else:
        from pykvcache.kernels.launch import table as kernels_table

        kernels_table.use(launch_table.user_table())


def replay_demands(
    request: Request, demands: dict[int, Demand], advance: Advance = lambda *a, **k: None
) -> tuple[list[int], int]:
    """Fill demands by block size; lengths of rows that were in the cache, and the mean prompt."""
    from pykvcache.sizes import parse_memory

    memory = parse_memory(request.memory)
    assert memory is not None
    config = request.shape.config()
    slots = memory // config.token_bytes
    if slots < max(request.block_sizes):
        raise ValueError(
            f"memory of {request.memory} holds {slots} tokens of {config.name}, less than a block "
            f"of {max(request.block_sizes)}"
        )
    cost = StepCost()
    budget = Budget(slots, memory, config)
    plan = Plan.of(request.workload, budget, Rules(cost), [PAGED], list(request.block_sizes))
    lengths: list[int] = []

    def observe(start: float, end: float, rows: Rows) -> float:
        lengths.extend(rows.length.tolist())
        return end if len(lengths) < KEPT_LENGTHS else math.inf

    for case in plan.cases:
        assert case.block_size is not None
        advance(0, title=f"replaying blocks of {case.block_size}")
        result = run_case(case, plan.workload, slots, plan.max_len, plan.rules)
        if not result.output_tokens:
            raise ValueError(f"no request of the trace fits {request.memory}")
        demands[case.block_size] = Demand.of(result, cost)
        advance(1)
    middle = Case(PAGED, min(plan.cases, key=lambda c: abs((c.block_size or 0) - 16)).block_size)
    run_case(middle, plan.workload, slots, plan.max_len, plan.rules, observe=observe)
    positive = [length for length in lengths if length > 0]
    return positive or [1], round(plan.survey.prompt)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this device reads."""
    if device.type == "cpu":
        timings = interleave(
            peaks.read_contenders(),
            0.5,
            lambda run, first, count: count * elapsed(lambda i: run(first + i), count, device),
        )
        return peaks.read_bandwidth(timings)
    from pykvcache.bench.gpu import copy_bandwidth

    return copy_bandwidth(2**30)


def step_seconds(request: Request, bandwidth: float) -> float:
    """What a step costs beside attention: reading the weights once."""
    if request.step_seconds is not None:
        return request.step_seconds
    weights = request.shape.weight_bytes
    if weights is None:
        raise ValueError(
            f"{request.shape.name} does not say how large its weights are; give step_ms"
        )
    return weights / bandwidth


def measure_prefill(bench: Bench, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of a layer's attention for a prompt token, by block size, in turns."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(PREFILL_ROUNDS):
        for size in (*sizes[number % len(sizes) :], *sizes[: number % len(sizes)]):
            times[size].append(bench.prefill(size))
    return {size: statistics.median(found) for size, found in times.items()}


def choose_rows(bench: Bench, block_size: int, rows: Sequence[int]) -> int:
    """Query rows of the general kernel; another than its own choice only if faster beyond doubt.

    Of the counts that cut the prompt alike the first stands for all.
    """
    if len(rows) > 1:
        alike = {bench.prefill_items(block_size, count): count for count in reversed(rows)}
        rows = sorted(alike.values(), key=rows.index)
    if len(rows) < 2:
        return 0
    samples = {count: Samples() for count in rows}
    for number in range(ROWS_ROUNDS):
        for count in (*rows[number % len(rows) :], *rows[: number % len(rows)]):
            samples[count].times.append(bench.prefill(block_size, count))
    best = min(rows, key=lambda count: samples[count].median)
    gain = samples[0].against(samples[best])[0]
    return best if gain > ROWS_MARGIN and samples[0].is_slower(samples[best]) else 0
