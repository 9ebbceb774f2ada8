"""Comparison with the results of an earlier run, kept, broken or of other sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench import cases
from pykvcache.bench.compare import compare, duration, read_results, times_of
from pykvcache.bench.kernels import Result
from pykvcache.bench.timing import Timing

ROOT = Path(__file__).resolve().parents[2]


def results(median: float, **environment: object) -> dict:
    row = {"phase": "decode", "contender": "paged 16", "median": median}
    row |= {"p10": 0.9 * median, "p90": 1.1 * median}
    return {"environment": {"cpu": "x", "threads": 1} | environment, "results": [row]}


def test_comparison_tells_change_from_noise() -> None:
    same = compare(results(1.0), results(1.05))
    assert same.changes[0].verdict == "" and same.worst == 1.05 and not same.warnings
    assert compare(results(1.0), results(1.15)).changes[0].verdict == "slower, spreads overlap"
    assert compare(results(1.0), results(2.0)).changes[0].verdict == "slower"
    assert compare(results(1.0), results(0.5)).changes[0].verdict == "faster"
    other = compare(results(1.0), results(1.0, cpu="y", threads=2))
    assert other.warnings == ["cpu was 'x' and is 'y'", "threads was 1 and is 2"]
    moved = results(1.0)
    moved["results"][0]["contender"] = "paged 32"
    found = compare(results(1.0), moved)
    assert not found.changes and len(found.gone) == len(found.added) == 1


@pytest.mark.parametrize(
    "name", ["kernels-quick-cpu-zen5", "generate-cpu-zen5", "allocator-cpu-zen5"]
)
def test_kept_results_can_be_compared(name: str) -> None:
    kept = read_results(ROOT / "benchmarks" / "results" / f"{name}.json")
    found = compare(kept, kept)
    assert len(found.changes) == len(list(times_of(kept["results"]))) > 5
    assert found.worst == 1.0


def test_kept_names_are_those_of_new_results() -> None:
    """Rows of one length are called what they were before there were others."""
    kept = read_results(ROOT / "benchmarks" / "results" / "kernels-quick-cpu-zen5.json")
    rows = [
        Result(case, 1, "paged 16", Timing(1.0, 1.0, 1.0, 1), 1.0, 1.0, 1.0).to_json()
        for case in cases.select(quick=True)
    ]
    rows.append(rows[0] | {"mixed": "1x1024+1x64"})
    found = compare(kept, {"environment": {}, "results": rows})
    assert len(found.changes) == len(rows) - 1
    assert len(found.added) == 1 and "mixed=1x1024+1x64" in found.added[0]


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (2.5, 3.1e-3, 4.35e-6, 45e-9, None)]
    assert shown == ["2.5 s", "3.1 ms", "4.35 us", "45 ns", ""]


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"environment": {}, "results": [{}]}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old.json (is no JSON|must have|has no times)"):
        read_results(path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"environment": None}, "environment must be an object"),
        ({"results": 5}, "results must be a list of objects, got int"),
        ({"results": None}, "results must be a list of objects, got NoneType"),
        ({"results": ["a"]}, "results, row 0: must be an object, got str"),
        ({"results": {"a": 1}}, "results must be a list of objects, got dict"),
        ({"results": [{"median": "x"}]}, "a time must be a number above 0, got 'x'"),
        ({"results": [{"median": None}]}, "a time must be a number above 0, got None"),
        ({"results": [{"median": 0}]}, "row 0: a time must be a number above 0, got 0"),
        ({"results": [{"median": float("nan")}]}, "above 0, got nan"),
        ({"results": [{"median": 1, "p10": "x"}]}, "above 0, got 'x'"),
        ({"results": [{"timing": {}}]}, "row 0: a time must be a number above 0, got None"),
        ({"results": [{"timing": 3}]}, "timing must be an object, got int"),
        ({"results": [{"timings": [1]}]}, "timings must be an object, got list"),
    ],
)
def test_broken_files_are_named_before_the_work(
    run, tmp_path: Path, broken: dict, message: str
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(results(1.0) | broken))
    code, _, err = run("allocator", "--num-blocks", "200000", "--compare", str(path))
    assert code == 2 and message in err and err.count("\n") == 1


def test_other_sizes_are_not_compared(run_kernels, tmp_path: Path) -> None:
    row = {"where": "call", "operation": "x", "timing": {"median": 1.0}}
    default, few = ([row | {"num_blocks": n}] for n in (1_000_000, 200_000))
    assert dict(times_of([row])).keys() == dict(times_of(default)).keys()
    assert not dict(times_of(default)).keys() & dict(times_of(few)).keys()
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"environment": {}, "results": [row]}))
    code, out, _ = run_kernels("--compare", str(path), "--fail-above", "1.1")
    assert code == 1 and "nothing to judge by" in out
    assert run_kernels("--compare", str(path))[0] == 0
