"""The tuner: the race, the objective, launch tables and what they change, the command."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pykvcache import _C, cli, launch_table, ops
from pykvcache.bench import kernels
from pykvcache.bench.cases import Case as Call
from pykvcache.bench.cases import Heads
from pykvcache.bench.replay.cases import PAGED, Case, run_case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.timing import WrongResult
from pykvcache.bench.tune import measure, plan, screen
from pykvcache.bench.tune import plots as tune_plots
from pykvcache.bench.tune.explain import CallSpec, Explanation, describe_launch
from pykvcache.bench.tune.measure import Bench, fit_lengths, launches_for, table_of
from pykvcache.bench.tune.objective import Demand, Objective
from pykvcache.bench.tune.plan import Request
from pykvcache.bench.tune.search import (
    BOUNDED_ROUNDS,
    DEFAULT,
    MIN_ROUNDS,
    Candidate,
    Launch,
    Race,
)
from pykvcache.bench.tune.shapes import Shape, load_shape

tune_command = importlib.import_module("pykvcache.cli.tune")  # not the function

SIZES = (4, 16, 64, 256)
GRID = [DEFAULT, *(Launch(tile, stages) for tile in (16, 32, 64) for stages in (1, 2, 3))]
SPEC = "B=8,L=4096,HQ=32,HKV=8,D=128,block_size=16,dtype=bf16"
SMALL = Shape("small", 2, 4, 2, 16, "fp32", 1e5)


@pytest.fixture(autouse=True)
def _restore_launches():
    yield
    launch_table.use_on_cpu({})


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


# Launches of a GPU, where some do not fit and each has to be compiled.


class FakeGpu:
    """Compiles for a second, has room for some launches, and is faster with large tiles."""

    def __init__(self, limit: int = 64) -> None:
        self.now, self.limit, self.compiled = 0.0, limit, set()

    def check(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            self.now += candidate not in self.compiled
            self.compiled.add(candidate)
            if candidate.launch.tile > self.limit:
                from triton.runtime.errors import OutOfResources

                raise OutOfResources(405_504, 232_448, "shared memory")

    def decode(self, candidate: Candidate) -> float:
        return 1.0 / (candidate.launch.tile or 20)


def test_launches_without_room_drop_out() -> None:
    pytest.importorskip("triton")
    gpu = FakeGpu()
    grid = launches_for(torch.device("cuda"), 1)
    found = screen.screen(gpu, [8, 16], grid, 1e5, lambda: gpu.now)
    assert {c.launch.tile for c in found} == {0, 16, 32, 64}
    assert {c.block_size for c in found} == {8, 16}
    assert len(gpu.compiled) == len(grid) + len(found) // 2
    with pytest.raises(Exception, match="out of resource"):
        screen.screen(FakeGpu(limit=-1), [16], grid, 1e5, lambda: 0.0)

    def broken(candidates: object) -> None:
        raise WrongResult("is off")

    gpu.check = broken  # type: ignore[method-assign]
    with pytest.raises(WrongResult):
        screen.screen(gpu, [16], grid, 1e5, lambda: 0.0)


def test_screening_keeps_to_the_time_and_to_the_quickest() -> None:
    pytest.importorskip("triton")
    grid, sizes = launches_for(torch.device("cuda"), 1), (1, 4, 16, 64, 256)
    gpu = FakeGpu()
    found = screen.screen(gpu, sizes, grid, 60.0, lambda: gpu.now)
    assert gpu.now <= 45  # a third to try, a third to compile, one more try each
    kept = [c.launch for c in found if c.block_size == 16]
    tried = [c.launch.tile for c in gpu.compiled if c.block_size == 16 and c.launch.tile <= 64]
    assert kept[0] == DEFAULT and len(tried) > len(kept) > 3
    assert [g.tile for g in kept[1:]] == sorted(tried, reverse=True)[: len(kept) - 1]
    assert {c.block_size for c in found if c.launch == DEFAULT} == set(sizes)
    gpu = FakeGpu()
    found = screen.screen(gpu, sizes, grid, 0.1, lambda: gpu.now)
    assert found == [Candidate(16), *(Candidate(size) for size in sizes if size != 16)]


def test_shared_memory_rules_launches_out_before_they_are_compiled() -> None:
    """By what Triton reports: D=128 bf16, tile 128, 4 stages: 204,800 bytes; D=256: 405,504."""
    narrow = Shape("narrow", 2, 4, 2, 128, "bf16", 1e5)
    wide = Shape("wide", 2, 4, 2, 256, "bf16", 1e5)
    sm_80, sm_90 = 166_912, 232_448
    most = Launch(128, 4, 2, 8)
    assert not screen.fits_shared_memory(narrow, most, sm_80)
    assert screen.fits_shared_memory(narrow, most, sm_90)
    assert not screen.fits_shared_memory(wide, most, sm_90)
    assert screen.fits_shared_memory(wide, DEFAULT, sm_90)
    assert screen.fits_shared_memory(wide, most, None)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_backend_that_auto_chooses_is_measured(monkeypatch, backend: str) -> None:
    """Kernels that choose for themselves race with their own launch alone, and get no table."""
    shape = load_shape("gpt2", "bf16")
    request = Request(shape, Workload("sharegpt"), "1GiB", [8, 16], device="cuda")
    bench = SimpleNamespace(backend=backend, device=torch.device("cuda"), check=lambda *a: None)
    monkeypatch.setattr(screen, "shared_memory", lambda device: 1)
    monkeypatch.setattr(screen, "screen", lambda bench, sizes, grid, *rest: grid)
    found = plan.choose_candidates(request, bench, [8, 16], (0,))
    if backend == "cuda":
        assert found == [Candidate(8), Candidate(16)]
    else:  # the grid, less what the chip has no room for
        assert found == [DEFAULT]
    old = {"sm_90": {"decode": [{"dim": 64, "tile": 16, "stages": 1, "warps": 4}]}}
    if backend == "cuda":
        tuning = SimpleNamespace(backend="cuda", request=request, table={})
        assert tune_command.merge(tuning, old) == old


def test_compiled_kernels_get_no_launch(monkeypatch) -> None:
    monkeypatch.setattr(measure, "STORAGE_BYTES", 2**18)
    used: list[object] = []
    monkeypatch.setattr(measure, "use_launch", lambda *args, **kwargs: used.append(args))
    Bench(SMALL, [10], 10, backend="cuda")._use(DEFAULT)
    assert not used
    Bench(SMALL, [10], 10)._use(DEFAULT)
    assert used


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


# Launch tables.


def write(path: Path, table: object) -> Path:
    path.write_text(json.dumps(table))
    return path


def explain(text: str = SPEC) -> dict[str, int]:
    return describe_launch(CallSpec.parse(text))[1]


def test_a_table_changes_what_is_launched() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before, general = explain(), explain(SPEC + ",q=512")
    entry = {"dim": 128, "bytes": 2}
    launch_table.use_on_cpu(
        {
            "cpu": {
                "decode": [entry | {"tile": 64, "stages": 1, "splits": 8}],
                "prefill": [entry | {"rows": 128}],
            }
        }
    )
    after = explain()
    assert (before["tile"], before["stages"]) == (16, 3)
    assert (after["tile"], after["stages"]) == (64, 1)
    assert after["items"] > before["items"]
    assert (general["query_tile"], explain(SPEC + ",q=512")["query_tile"]) == (128, 32)
    assert explain(SPEC.replace("bf16", "fp32"))["tile"] == 16  # another element size
    assert explain(SPEC.replace("D=128", "D=64"))["tile"] == 32
    streamed = explain(SPEC.replace("HQ=32", "HQ=8").replace("bf16", "fp32"))
    if _C.cpu_isa().startswith("avx512"):  # one query row a KV head: the two streams
        assert (streamed["tile"], streamed["stages"]) == (32, 0)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 576])
def test_every_launch_gives_the_same_result(dtype: torch.dtype, head_dim: int) -> None:
    k_cache, v_cache = torch.randn(2, 40, 2, 16, head_dim).to(dtype)
    table = torch.randperm(40)[:32].view(2, 16).int()
    seq_lens = torch.tensor([201, 37], dtype=torch.int32)
    for counts in ([1, 1], [120, 37]):
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        q = torch.randn(sum(counts), 8, head_dim).to(dtype)
        rest = (table, seq_lens, starts, max(counts))
        expected, _ = ops.paged_attention(
            q.float(), k_cache.float(), v_cache.float(), *rest, backend="reference"
        )
        for choice in ({}, {"tile": 16}, {"tile": 64, "stages": 3}, {"tile": 48, "stages": 1}):
            rows = {"rows": 8 * choice["tile"]} if "tile" in choice else {}
            launch_table.use_on_cpu({"cpu": {"decode": [choice], "prefill": [rows]}})
            out, _ = ops.paged_attention(q, k_cache, v_cache, *rest, backend="cpu")
            error = (out.float() - expected).abs().max()
            assert error <= 16 * torch.finfo(dtype).eps * max(1, expected.abs().max())


def test_first_entry_that_fits_is_taken() -> None:
    entries = [{"max_dim": 64, "tile": 16}, {"dim": 128, "max_bytes": 2, "tile": 32}, {"tile": 64}]
    launch_table.use_on_cpu({"cpu": {"decode": entries}})
    for dim, dtype, tile in (
        (64, "bf16", 16),
        (128, "bf16", 32),
        (128, "fp32", 64),
        (80, "bf16", 64),
    ):
        spec = SPEC.replace("D=128", f"D={dim}").replace("bf16", dtype)
        assert explain(spec)["tile"] == tile
    for entry in entries:
        assert launch_table.fits(entry, 64, 2) == ("dim" not in entry)


def test_user_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"cpu": {"decode": [{"tile": 32}]}}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_table.VARIABLE, raising=False)
    assert launch_table.find_user_table() == ({}, None)
    path = tmp_path / "pykvcache" / "launch.json"
    path.parent.mkdir()
    write(path, section)
    assert launch_table.find_user_table() == (section, path)
    named = write(tmp_path / "mine.json", {})
    monkeypatch.setenv(launch_table.VARIABLE, str(named))
    assert launch_table.find_user_table() == ({}, named)
    monkeypatch.setenv(launch_table.VARIABLE, "none")
    assert launch_table.find_user_table() == ({}, None)
    monkeypatch.setenv(launch_table.VARIABLE, str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"launch table .*nothing.json cannot be read"):
        launch_table.find_user_table()
    monkeypatch.delenv(launch_table.VARIABLE)
    path.write_text("{")
    with pytest.warns(UserWarning, match=r"no launch table is used: .*is no JSON"):
        assert launch_table.user_table() == {}


def test_broken_table_that_was_named(tmp_path: Path) -> None:
    """Nothing is refused, but it is said."""
    command = [sys.executable, "-W", "always", "-m", "pykvcache"]
    environment = os.environ | {launch_table.VARIABLE: str(tmp_path / "nothing.json")}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    found = subprocess.run([*command, "info"], **options)
    assert found.returncode == 0 and "nothing.json cannot be read" in found.stderr


def test_section_of_another_processor_is_not_used() -> None:
    table = {"cpu": {"device": "another", "decode": [{"tile": 64}]}}
    assert not launch_table.use_on_cpu(table)
    assert explain()["tile"] == 16
    assert launch_table.use_on_cpu(table, cpu_name="another")
    assert explain()["tile"] == 64


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "must be a JSON object"),
        ({"cpu": 3}, "section cpu must be an object"),
        ({"cpu": {"decode": [7]}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decode": [{"tiles": 7}]}}, "cpu.decode knows .*, got 'tiles'"),
        ({"cpu": {"decode": [{"tile": 0}]}}, "tile must be one of 16, 32, 48, 64, got 0"),
        ({"cpu": {"decode": [{"tile": 50}]}}, "tile must be one of 16, 32, 48, 64, got 50"),
        ({"cpu": {"decode": [{"stages": 9}]}}, "stages must be an integer from 1 to 3, got 9"),
        ({"cpu": {"prefill": [{"rows": 9999}]}}, "rows must be an integer from 1 to 4096"),
        ({"cpu": {"decode": [{"splits": 10**25}]}}, "splits must be an integer from 1 to 64"),
        ({"cpu": {"decode": [{"dim": True}]}}, "dim must be an integer from 1 to 576, got True"),
        ({"cpu": {"decode": None}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decode": 5}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decod": []}}, "section cpu knows decode, prefill, device, got 'decod'"),
        ({"cpu": {"device": 5}}, "cpu.device must be a processor's name, got 5"),
        ({"cpus": {}}, "sections are cpu, sm_N, gfxN and interpreter, got 'cpus'"),
        ({"sm_90": {"programs_per_sm": 0}}, "programs_per_sm must be an integer from 1 to 64"),
        ({"sm_90": {"decode": [{"tile": 48, "stages": 1, "warps": 4}]}}, "tile must be one of"),
        ({"sm_90": {"decode": [{"tile": 16}]}}, "sm_90.decode needs stages, warps"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        launch_table.read_table(write(tmp_path / "launch.json", table))
    assert "launch.json" in str(caught.value) and "\n" not in str(caught.value)


def test_launches_out_of_range_change_nothing() -> None:
    launch_table.use_on_cpu({"cpu": {"decode": [{"tile": 32}]}})
    with pytest.raises(ValueError, match="stages must be 0 to 3, got 9"):
        launch_table.use_on_cpu({"cpu": {"decode": [{"stages": 9}]}})
    with pytest.raises(ValueError, match="an entry is 9 integers"):
        _C.set_launches(array("q", [0] * 8).tobytes())
    assert explain()["tile"] == 32


@pytest.mark.parametrize(
    "text", ['{"cpu": {"decode": 5}}', '{"cpu": {"decode": [{"tile": 1}]}}', "["]
)
def test_broken_table_is_a_warning(tmp_path: Path, monkeypatch, text: str) -> None:
    path = tmp_path / "launch.json"
    path.write_text(text)
    monkeypatch.setenv(launch_table.VARIABLE, str(path))
    with pytest.warns(UserWarning, match=r"no launch table is used: .*launch.json"):
        assert ops.LOADERS["cpu"]() == "ready"
    monkeypatch.setattr(launch_table, "check_table", lambda table: None)  # and one that C++ refuses
    path.write_text('{"cpu": {"decode": [{"stages": 9}]}}')
    with pytest.warns(UserWarning, match="stages must be 0 to 3, got 9"):
        assert ops.LOADERS["cpu"]() == "ready"


CALLS = {"decode": {"dim": 128, "bytes": 2}, "prefill": {"dim": 128, "bytes": 2}}


def test_merging_replaces_what_was_measured_and_keeps_other_models() -> None:
    mine = {"dim": 128, "bytes": 2}
    old = {"cpu": {"device": "x", "decode": [{"dim": 64, "tile": 16}, mine | {"tile": 16}]}}
    new = {"device": "x", "decode": [mine | {"tile": 64}]}
    merged = launch_table.merge_section(old, "cpu", new, CALLS)
    assert merged["cpu"]["decode"] == [mine | {"tile": 64}, {"dim": 64, "tile": 16}]
    assert launch_table.merge_section({}, "cpu", new, CALLS) == {"cpu": new}
    # the kernels' own choice was best: nothing that says otherwise stays in force
    merged = launch_table.merge_section(old, "cpu", {"device": "x"}, CALLS)
    assert merged["cpu"]["decode"] == [{"dim": 64, "tile": 16}]
    rows = {"device": "x", "prefill": [mine | {"rows": 256}]}
    merged = launch_table.merge_section(old, "cpu", rows, CALLS)
    assert merged["cpu"]["decode"] == [{"dim": 64, "tile": 16}]
    wide = {"cpu": {"device": "x", "decode": [{"max_dim": 256, "tile": 16}]}}
    merged = launch_table.merge_section(wide, "cpu", {"device": "x"}, CALLS)
    assert merged["cpu"]["decode"] == [mine, {"max_dim": 256, "tile": 16}]
    launch_table.check_table(merged)
    launch_table.use_on_cpu(merged, "x")
    assert explain()["tile"] == 16 and explain(SPEC.replace("bf16", "fp32"))["tile"] == 16
    only = {"cpu": {"device": "x", "decode": [mine | {"tile": 16}]}, "about": {}}
    assert launch_table.merge_section(only, "cpu", {"device": "x"}, CALLS) == {"about": {}}


def test_merging_never_relabels_entries_of_another_processor() -> None:
    old = {"cpu": {"device": "x", "decode": [{"dim": 64, "tile": 16}]}}
    new = {"device": "y", "decode": [{"dim": 128, "bytes": 2, "tile": 64}]}
    assert launch_table.merge_section(old, "cpu", new, CALLS) == {"cpu": new}
    assert launch_table.merge_section(old, "cpu", {"device": "y"}, CALLS) == old


def test_merging_a_section_of_a_gpu() -> None:
    entry = {"dim": 128, "tile": 32, "stages": 4, "warps": 8}
    prefill = entry | {"rows": 64}
    old = {"sm_90": {"decode": [entry], "prefill": [prefill], "programs_per_sm": 4}}
    calls = {"decode": {"dim": 128}}
    assert launch_table.merge_section(old, "sm_90", {}, calls) == {"sm_90": {"prefill": [prefill]}}


def test_triton_reads_the_same_table() -> None:
    pytest.importorskip("triton")
    from pykvcache.kernels.launch import table

    packaged = table.choose("decode", "sm_90", 128, 2)
    user = {"sm_90": {"decode": [{"dim": 128, "tile": 32, "stages": 4, "warps": 8}]}}
    try:
        table.use(user)
        assert table.choose("decode", "sm_90", 128, 2) == table.Choice(32, 8, 4)
        assert table.decode_tile("sm_90", 128) == 32
        assert table.choose("decode", "sm_80", 128, 2) == packaged
        assert table.choose("prefill", "sm_90", 128, 2).rows == 128
        own = {"sm_90": {"decode": [{"dim": 128}, user["sm_90"]["decode"][0]]}}
        table.use(own)  # an entry without parameters: the package's choice
        assert table.choose("decode", "sm_90", 128, 2) == packaged
    finally:
        table.use({})
    assert table.choose("decode", "sm_90", 128, 2) == packaged


# Shapes, measuring, explaining.


def test_shapes_of_models(tmp_path: Path) -> None:
    shape = load_shape("llama-3.1-8b", "bf16")
    assert (shape.layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (32, 32, 8, 128)
    assert shape.token_bytes == 4096 and shape.config().token_bytes == 32 * 4096
    fields = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    fields |= {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    write(tmp_path / "config.json", fields)
    found = load_shape(str(tmp_path), "fp32")
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (32, 8, 128)
    assert found.parameters == pytest.approx(7.5e9, rel=0.03)  # embeddings counted once
    with pytest.raises(ValueError, match="latents"):
        load_shape("deepseek-v3", "bf16")
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'int8'"):
        load_shape("gpt2", "int8")


def test_weights_of_experts(tmp_path: Path) -> None:
    """As the packaged table and the models' own cards have them."""
    qwen = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    qwen |= {"head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "num_experts": 128}
    qwen |= {"moe_intermediate_size": 768, "vocab_size": 151936}
    scout = {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
    scout |= {"hidden_size": 5120, "intermediate_size": 8192, "num_local_experts": 16}
    scout |= {"head_dim": 128, "intermediate_size_mlp": 16384, "vocab_size": 202048}
    maverick = scout | {"num_local_experts": 128, "interleave_moe_layer_step": 2}
    mixtral = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    mixtral |= {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8}
    known = load_shape("qwen3-30b-a3b", "bf16").parameters
    for fields, billions in ((qwen, known / 1e9), (scout, 107), (maverick, 401), (mixtral, 46.7)):
        path = write(tmp_path / "config.json", fields)
        assert load_shape(str(path), "bf16").parameters == pytest.approx(1e9 * billions, rel=0.04)
    dense = write(tmp_path / "config.json", qwen | {"mlp_only_layers": list(range(48))})
    assert load_shape(str(dense), "bf16").parameters < 4e9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 4}, "hidden_size must be at least num_attention_heads, got 4 and 8"),
        ({"kv_lora_rank": "x"}, "kv_lora_rank must be a positive integer, got 'x'"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": None}, "latents"),
        ({"text_config": "x"}, "text_config must be an object, got 'x'"),
        ({"intermediate_size": [1, 2]}, r"intermediate_size must be a positive integer, got \[1"),
        ({"vocab_size": "x"}, "vocab_size must be a positive integer, got 'x'"),
        ({"head_dim": 64, "hidden_size": "2048"}, "hidden_size must be a positive integer"),
    ],
)
def test_broken_configs_are_one_line(tmp_path: Path, fields: dict, message: str) -> None:
    whole = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512}
    whole |= {"intermediate_size": 64, "vocab_size": None}
    assert load_shape(str(write(tmp_path / "config.json", whole)), "bf16").parameters
    with pytest.raises(ValueError, match=message):
        load_shape(str(write(tmp_path / "config.json", whole | fields)), "bf16")


def test_lengths_are_spread_evenly() -> None:
    assert fit_lengths([10, 20, 30, 40], 1000) == [10, 20, 30, 40]
    chosen = fit_lengths(list(range(1, 101)), 200)
    assert sum(chosen) <= 200 and sum(chosen) / len(chosen) == pytest.approx(50, rel=0.1)
    assert fit_lengths([5000], 200) == [200]


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(measure, "STORAGE_BYTES", 2**21)
    monkeypatch.setattr(measure, "CALL_BYTES", 2**18)
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 1e-4)
    return Bench(SMALL, [50, 100, 150], 64)


def test_bench_checks_before_it_times(small_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [Candidate(size, Launch(32, 2)) for size in (1, 16, 64)]
    small_bench.check(candidates, (0, 128))
    right = ops.paged_attention

    def wrong(*args, backend, **kwargs):
        out, lse = right(*args, backend=backend, **kwargs)
        return (out * 1.01 if backend == "cpu" else out), lse

    monkeypatch.setattr(ops, "paged_attention", wrong)
    with pytest.raises(WrongResult, match=r"block_size=1, .* is off by"):
        small_bench.check(candidates)


def test_bench_rotates_over_the_storage(small_bench: Bench) -> None:
    assert small_bench.decode(Candidate(16)) > 0
    call = small_bench._calls["decode", 16]
    used = call.tables[call.tables >= 0]
    assert len(used) == len(used.unique()) > 0.7 * call.caches[0].shape[0]
    assert call.caches[0].shape[1:] == (2, 16, 16)
    assert small_bench.prefill(16, 128) > 0


def test_tables_of_launches() -> None:
    shape = load_shape("llama-3.1-8b", "bf16")
    where = {"dim": 128, "bytes": 2}
    cpu = table_of(shape, Launch(32, 2, 4), 256, "cpu")
    assert cpu["cpu"]["decode"] == [where | {"tile": 32, "stages": 2, "splits": 4}]
    assert cpu["cpu"]["prefill"] == [where | {"rows": 256}]
    assert table_of(shape, DEFAULT, 0, "cpu") == {}
    gpu = table_of(shape, Launch(32, 3, 2, 8), 0, "sm_90")
    entry = {"dim": 128, "tile": 32, "stages": 3, "warps": 8}
    assert gpu == {"sm_90": {"decode": [entry], "programs_per_sm": 2}}
    for table in (cpu, gpu):
        launch_table.check_table(table)
    for device, threads in (("cpu", 1), ("cpu", 2), ("cuda", 1)):
        grid = launches_for(torch.device(device), threads)
        assert grid[0] == DEFAULT and len(set(grid)) == len(grid)


def test_work_of_a_call() -> None:
    spec = CallSpec.parse("B=2,L=100,HQ=8,HKV=2,D=64,block_size=16,dtype=fp32,q=10")
    assert spec.flops == 4 * 2 * sum(range(91, 101)) * 8 * 64
    assert spec.bytes == 2 * 2 * 100 * 2 * 64 * 4 + 2 * 2 * 10 * 8 * 64 * 4 + 4 * 2 * 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B=1", "explain needs L, HQ, HKV, D"),
        ("L=x", "L must be a positive integer, got 'x'"),
        ("K=1", "explain knows B, L, .*; got 'K=1'"),
        ("L=1,HQ=3,HKV=2,D=8", "HQ must be a multiple of HKV, got 3 and 2"),
        ("L=1,HQ=2,HKV=2,D=600", "D must be 576 at most, got 600"),
        ("L=1,HQ=2,HKV=2,D=8,q=2", "q must be L at most, got 2 and 1"),
        ("L=10,HQ=2,HKV=2,D=8,L=20", "L is given twice"),
        ("L=1,HQ=2,HKV=2,D=8,dtype=int4", "dtype must be one of .*, got 'int4'"),
    ],
)
def test_calls_that_cannot_be_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CallSpec.parse(text)


# The command.


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run `pykvcache tune` over small memory: (exit code, standard output, standard error)."""
    monkeypatch.setattr(measure, "STORAGE_BYTES", 2**24)
    monkeypatch.setattr(measure, "CALL_BYTES", 2**20)
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(plan, "read_bandwidth", lambda device: 2e10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pykvcache", "tune", *arguments])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


QUICK = ("--model-config", "gpt2", "--requests", "100", "--seconds", "0.1", "--memory", "256MiB",
         "--trace", "sharegpt", "--block-sizes", "8,16,64", "--device", "cpu")  # fmt: skip


def test_tune_recommends_and_writes(run, tmp_path: Path, monkeypatch) -> None:
    rows, table, picture = (tmp_path / name for name in ("rows.json", "launch.json", "tune.png"))
    monkeypatch.setattr(plan, "table_of", lambda *args: {"cpu": {"decode": [{"tile": 48}]}})
    code, out, err = run(*QUICK, "--json", str(rows), "--out", str(table), "--plot", str(picture))
    assert code == 0, err
    found = json.loads(rows.read_text())["results"]
    assert [row["block_size"] for row in found] == [8, 16, 64]
    chosen = [row for row in found if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["tied"]
    best = max(row["throughput"] for row in found)
    assert chosen[0]["throughput"] >= 0.97 * best
    assert found[0]["waste"] < found[1]["waste"] < found[2]["waste"]
    assert f"block size {chosen[0]['block_size']}" in out
    assert picture.stat().st_size > 10_000
    assert explain()["tile"] == 16  # the race left nothing behind
    monkeypatch.setenv(launch_table.VARIABLE, str(table))
    launch_table.use_on_cpu(launch_table.find_user_table()[0])
    assert explain()["tile"] == 48


def test_tune_drops_its_own_older_entry(run, tmp_path: Path, monkeypatch) -> None:
    """What was best once and is not now does not stay in force; a broken file is set aside."""
    monkeypatch.setattr(plan, "launches_for", lambda device, threads: [DEFAULT])
    monkeypatch.setattr(plan, "choose_rows", lambda *args: 0)
    monkeypatch.setenv(launch_table.VARIABLE, "none")
    path = tmp_path / "cache" / "pykvcache" / "launch.json"
    path.parent.mkdir(parents=True)
    device, entry = launch_table.processor(), {"dim": 64, "bytes": 2, "tile": 16, "stages": 1}
    other = {"dim": 128, "tile": 16}
    write(path, {"cpu": {"device": device, "decode": [entry, other]}})
    code, out, err = run(*QUICK)
    assert code == 0, err
    assert json.loads(path.read_text())["cpu"] == {"device": device, "decode": [other]}
    assert "older entries for these calls are gone" in out
    assert "not read while PYKVCACHE_LAUNCH_TABLE is none" in out
    assert "stays as it is" in run(*QUICK)[1]
    path.write_text("{")
    monkeypatch.setattr(plan, "table_of", lambda *args: {"cpu": {"decode": [other]}})
    code, out, err = run(*QUICK)
    assert code == 0 and "the old one was broken" in out
    assert path.with_suffix(".old").read_text() == "{"
    assert launch_table.read_table(path)["cpu"]["decode"] == [other]


def test_interrupted_tune_keeps_what_is_known(run, tmp_path: Path, monkeypatch) -> None:
    """Exit code 130, no launch table; before the race only what the replay found."""
    rows, table = tmp_path / "rows.json", tmp_path / "launch.json"
    options = (*QUICK, "--json", str(rows), "--out", str(table))

    def stop(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "choose_rows", stop)
    code, out, err = run(*options)
    assert code == 130 and "interrupted" in err and "what was measured so far" in out
    assert "so far, block size" in out and "launch table: not written" in out
    found = json.loads(rows.read_text())["results"]
    assert all(row["interrupted"] and row["decode_ns_per_token"] > 0 for row in found)
    monkeypatch.setattr(plan, "read_bandwidth", stop)
    code, out, err = run(*options)
    assert code == 130 and "the replay found" in out and not table.exists()
    found = json.loads(rows.read_text())["results"]
    assert [row["block_size"] for row in found] == [8, 16, 64]
    assert found[0]["waste"] < found[2]["waste"]
    assert explain()["tile"] == 16


def test_a_tiny_call_in_large_blocks_takes_little_memory() -> None:
    """Its copies were so many that their blocks were 68 GB."""
    case = Call("decode", Heads("call", 1, 1, 64), torch.bfloat16, 1, 1)
    copies = kernels.count_copies(case, [256])
    assert copies * kernels.pool_bytes(case, 256) <= kernels.MOST_POOL_BYTES
    assert kernels.count_copies(case, [16]) <= kernels.MOST_COPIES
    ordinary = Call("decode", Heads("gqa", 32, 8, 128), torch.bfloat16, 1, 1024)
    assert kernels.count_copies(ordinary, [16, 32, 64]) == 64


def test_explain_says_what_was_achieved(run, tmp_path: Path, monkeypatch) -> None:
    rows = tmp_path / "rows.json"
    table = write(tmp_path / "launch.json", {"cpu": {"decode": [{"tile": 64, "stages": 1}]}})
    launch_table.use_on_cpu(launch_table.read_table(table))
    monkeypatch.setenv(launch_table.VARIABLE, str(table))
    text = "B=2,L=300,HQ=8,HKV=2,D=64,block_size=16,dtype=bf16"
    code, out, err = run("--explain", text, "--device", "cpu", "--json", str(rows))
    assert code == 0, err
    found = json.loads(rows.read_text())["results"][0]
    assert found["launch"]["tile"] == 64 and "tile 64, stages 1" in out
    assert found["floor"] == pytest.approx(
        max(found["bytes"] / found["bandwidth"], found["flops"] / found["flop_rate"])
    )
    assert "achieved" in out and str(table) in out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-config", "nothing"), "model config must be"),
        (("--trace", "nothing"), "trace must be"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--block-sizes", "16,x"), "--block-sizes must be positive integers"),
        (("--memory", "0"), "memory"),
        (("--memory", "1MiB"), "less than a block of 256"),
        (("--seconds", "0"), "seconds must be more than 0"),
        (("--tolerance", "-1"), "tolerance must be 0 to 50"),
        (("--out", "/no/such/folder/x.json"), "--out: there is no folder"),
        (("--json", "/no/such/folder/x.json"), "--json: there is no folder"),
        (("--out", "-", "--json", "-"), "cannot both"),
        (("--out", "/proc/x.json"), "--out: /proc/x.json cannot be written"),
        (("--json", "/tmp"), "--json: /tmp is a folder"),
        (("--json", ""), "--json needs the name of a file"),
        (("--plot", "x.xyz"), "--plot must end in .png, .svg, .pdf, .jpg, got 'x.xyz'"),
        (("--plot", "noext"), "--plot must end in"),
        (("--seconds", "nan"), "seconds must be more than 0"),
        (("--step-ms", "nan"), "step_ms must be 0 or more, got nan"),
        (("--explain", "L=1"), "explain needs HQ"),
        (("--explain", "L=10,HQ=2,HKV=2,D=64,block_size=1000000000000"), "GiB are free"),
        (("--explain", "L=1000000000000,HQ=2,HKV=2,D=64"), "GiB are free"),
        (("--device", "tpu"), "--device must be cpu or cuda"),
        (("--device", "cpu", "--backend", "triton"), "--backend must be one of auto, cpu on cpu"),
        (("--model-config", "deepseek-v3"), "latents"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("chosen", [16, 64])
def test_labels_stay_inside_the_picture(chosen: int) -> None:
    from matplotlib.figure import Figure

    rows = [
        {"block_size": size, "chosen": size == chosen, "waste": size / 20, "throughput": 1.0}
        for size in (16, 64)
    ]
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    tune_plots._speed_against_waste(axes, rows, 0.03)
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    for label in axes.texts:
        box = label.get_window_extent()
        assert inside.x0 < box.x0 and box.x1 < inside.x1
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert "1" in ticks and not any("10^" in tick for tick in ticks)


def test_floor_is_the_larger_of_two() -> None:
    from pykvcache.bench.timing import Timing

    spec = CallSpec.parse(SPEC)
    timing = Timing(1.0, 1.0, 1.0, 3)
    reading = Explanation(spec, "cpu", "k", {}, 1e9, 1e15, timing)
    computing = Explanation(spec, "cpu", "k", {}, 1e15, 1e9, timing)
    assert (reading.floor, reading.bound) == (spec.bytes / 1e9, "reading")
    assert (computing.floor, computing.bound) == (spec.flops / 1e9, "arithmetic")
