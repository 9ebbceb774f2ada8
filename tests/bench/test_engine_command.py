"""`pykvcache bench engine`: its contenders and steps; Ctrl-C there and in `bench generate`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import pykvcache
from pykvcache.bench import generate as generate_code
from pykvcache.bench import models, throughput, timing, transformers_batching
from pykvcache.bench.compare import times_of
from pykvcache.bench.models import build_llama
from pykvcache.bench.timing import Missing


@pytest.mark.parametrize(("command", "stop"), [("generate", 5), ("generate", 1), ("engine", 4)])
def test_interrupt_keeps_the_samples_of_a_workload(
    run, monkeypatch: pytest.MonkeyPatch, command: str, stop: int
) -> None:
    """After 5 runs there are 3 and 2 samples of the two variants; after 1, nothing to show."""
    runs = 0

    def generate(*_: object) -> None:
        nonlocal runs
        runs += 1
        if runs > stop:
            raise KeyboardInterrupt

    def missing(*_: object) -> None:
        raise Missing("is not looked for")

    def take_turns(contenders, *arguments):
        return timing.take_turns(dict.fromkeys(contenders, generate), *arguments)

    monkeypatch.setattr(generate_code, "take_turns", take_turns)
    monkeypatch.setattr(throughput, "take_turns", take_turns)
    monkeypatch.setattr(throughput, "check_tokens", lambda *_: None)
    monkeypatch.setattr(throughput, "check_batching", missing)
    monkeypatch.setattr(models, "build_llama", lambda *_: build_llama(32, 64, 1, 2, 1, 4096))
    workload = "step" if command == "generate" else "mixed"
    code, out, err = run(command, "--workload", workload, "--repeats", "9", "--json", "-")
    assert code == 130
    rows = json.loads(out)["results"]
    if stop == 1:
        assert rows == [] and "nothing was measured yet" in err
        return
    assert "what was measured so far" in err
    counts = [found["samples"] for found in rows[0]["timings"].values()]
    assert sorted(counts) == [stop // 2, stop - stop // 2]


@pytest.fixture
def tiny_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench engine` on three requests of a model that takes milliseconds."""
    workload = generate_code.Workload("mixed", 3, 8, 20, 18)
    monkeypatch.setitem(generate_code.WORKLOADS, "mixed", workload)
    monkeypatch.setattr(models, "build_llama", lambda *_: build_llama(32, 64, 1, 2, 1, 4096))


def test_generate_batch_is_a_checked_contender(
    run, tiny_requests: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("engine", "--workload", "mixed", "--repeats", "2", "--json", "-")
    code, out, err = run(*command)
    assert code == 0, err
    timings = json.loads(out)["results"][0]["timings"]
    assert set(timings) == {"padded generate", "engine", "generate_batch"}

    complete = transformers_batching.complete

    def without(*arguments):
        code, out, err = run(*command)
        assert code == 0 and "generate_batch" not in json.loads(out)["results"][0]["timings"]
        return " ".join(err.split())

    def wrong(*arguments):
        return [[*tokens[:-1], tokens[-1] + 1] for tokens in complete(*arguments)]

    monkeypatch.setattr(transformers_batching, "complete", wrong)
    assert "generate_batch on mixed gives other tokens than generate" in without()
    monkeypatch.setattr(transformers_batching, "complete", lambda *_: 1 / 0)
    assert "generate_batch on mixed does not run here: division by zero" in without()


def test_generate_batch_that_takes_too_long_or_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_llama(32, 64, 1, 2, 1, 100)
    start = time.perf_counter()
    with pytest.raises(Missing, match="longer than --longest-run"):
        transformers_batching.complete(model, [[1, 2, 3]], [5000], 0.5)
    assert time.perf_counter() - start < 20
    assert [len(row) for row in transformers_batching.complete(model, [[1, 2], [3]], [3, 5])] == [
        3,
        5,
    ]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(Missing, match="stops at an error: no kernel"):
        transformers_batching.complete(model, [[1, 2, 3]], [5])


def test_steps_are_measured_with_as_many_rows_as_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = []
    step = pykvcache.Engine.step

    def watched(engine: pykvcache.Engine, *arguments: object) -> object:
        running.append(engine._scheduler.num_running)
        return step(engine, *arguments)

    monkeypatch.setattr(pykvcache.Engine, "step", watched)
    throughput.measure_overhead(300, 10)
    assert running[-1] == 300


def test_engine_overhead_command(run, tmp_path: Path) -> None:
    saved = tmp_path / "rows.json"
    code, out, err = run(
        "engine", "--overhead", "--rows", "1,4", "--steps", "10", "--json", str(saved)
    )
    assert code == 0, err
    found = dict(times_of(json.loads(saved.read_text())["results"]))
    assert "outside us" in out
    assert set(found) == {
        f"rows={n} {k}" for n in (1, 4) for k in ("plan", "settle", "rest", "step")
    }


def test_padded_batches_are_those_that_fit() -> None:
    requests = [(10, 5), (20, 1), (1, 2), (100, 100), (1, 1)]
    assert throughput.padded_batches(requests, 50) == [[5, 1], [2], [100], [1]]
    assert throughput.padded_batches(requests[:3], 75) == [[5, 1, 2]]
    assert throughput.padded_batches(requests[:3], 74) == [[5, 1], [2]]


def test_more_requests_run_on_a_budget_than_padded_ones() -> None:
    found = throughput.measure_capacity(80, 16_384)
    assert 1 <= found.padded_generating <= found.padded
    assert found.engine > 1.2 * found.padded
    assert found.engine_float8 > 1.3 * found.engine
    assert found.engine_peak >= found.engine
    assert found.budget_bytes * 0.5 < found.peak_bytes <= found.budget_bytes
