"""Launches of a GPU, where some do not fit and each has to be compiled."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from tune_samples import SMALL

from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.timing import WrongResult
from pykvcache.bench.tune import measure, plan, screen
from pykvcache.bench.tune.measure import Bench, launches_for
from pykvcache.bench.tune.plan import Request
from pykvcache.bench.tune.search import (
    DEFAULT,
    Candidate,
    Launch,
)
from pykvcache.bench.tune.shapes import Shape, load_shape

tune_command = importlib.import_module("pykvcache.cli.tune")  # not the function


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
    monkeypatch.setattr(measure, "COLD_BYTES", 2**18)
    used: list[object] = []
    monkeypatch.setattr(measure, "use_launch", lambda *args, **kwargs: used.append(args))
    Bench(SMALL, [10], 10, backend="cuda")._use(DEFAULT)
    assert not used
    Bench(SMALL, [10], 10)._use(DEFAULT)
    assert used
