"""`pykvcache bench`: results, files, comparison with an earlier run, plots, wrong arguments."""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import pykvcache
from pykvcache.bench import allocator as allocator_code
from pykvcache.bench import (
    cases,
    kernels,
    models,
    peaks,
    peers,
    plots,
    throughput,
    timing,
    transformers_batching,
    transformers_paged,
)
from pykvcache.bench import generate as generate_code
from pykvcache.bench.cases import Case, Heads
from pykvcache.bench.compare import compare, duration, read_results, times_of
from pykvcache.bench.models import build_llama
from pykvcache.bench.timing import Missing, WrongResult

kernels_command = importlib.import_module("pykvcache.cli.bench.kernels")  # not the function

ROOT = Path(__file__).resolve().parents[1]
SMALL = Heads("gqa", 4, 2, 16)


@pytest.fixture
def run(run_command):
    """Run `pykvcache bench ...`: (exit code, standard output, standard error)."""
    return partial(run_command, "bench")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel cases that take milliseconds."""
    monkeypatch.setattr(peaks, "READ_BYTES", 2**20)
    monkeypatch.setattr(peaks, "GEMM_SIZE", 64)
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**16)
    monkeypatch.setitem(cases.HEADS, "gqa", SMALL)
    monkeypatch.setattr(cases, "QUICK_DECODE_SIZES", ((1, 64), (1, 128), (2, 128)))
    monkeypatch.setattr(cases, "QUICK_PREFILL_SIZES", ((1, 64),))


QUICK = ("kernels", "--quick", "--heads", "gqa", "--dtypes", "fp32", "--threads", "1")
QUICK += ("--seconds", "0.01", "--block-sizes", "8,16", "--device", "cpu", "--peers", "none")


def test_kernels_saves_compares_and_draws(run, small, tmp_path: Path) -> None:
    first, folder = tmp_path / "first.json", tmp_path / "plots"
    code, out, err = run(*QUICK, "--json", str(first), "--plot", str(folder))
    assert code == 0, err
    assert "paged 16" in out and "% of read" in out and "% of GEMM" in out
    saved = json.loads(first.read_text())
    assert {"commit", "versions", "cpu", "threads"} <= set(saved["environment"])
    row = next(r for r in saved["results"] if r["contender"] == "paged 16")
    assert row["gb_per_second"] == pytest.approx(row["rate"] / 1e9)
    assert row["intensity"] == pytest.approx(2 * 2 / 4)  # group of 2, float32
    for name in ("roofline", "decode-by-context", "decode-by-block-size"):
        assert (folder / f"{name}.png").stat().st_size > 10_000

    code, out, err = run(*QUICK, "--compare", str(first), "--fail-above", "1000000")
    assert code == 0, err
    assert "new / old" in out and "warning" not in out
    for row in saved["results"]:
        row["median"], row["p10"], row["p90"] = (row[k] / 1e6 for k in ("median", "p10", "p90"))
    saved["environment"]["cpu"] = "another"
    first.write_text(json.dumps(saved))
    code, out, _ = run(*QUICK, "--compare", str(first), "--fail-above", "1.1")
    assert code == 1
    assert "slower" in out and "warning: other device" in out and "'another'" in out


def test_no_figure_of_a_wrong_result(run, small, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self) -> None:
        raise WrongResult("paged 16 is off by 1")

    monkeypatch.setattr(kernels.Workload, "check", wrong)
    code, out, err = run(*QUICK)
    assert code == 1 and "paged 16 is off by 1" in err
    assert "% of read" not in out


def test_interrupt_keeps_what_is_done(
    run, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = kernels.measure

    def stops(case: Case, *args, **kwargs):
        if case.batch == 2:
            raise KeyboardInterrupt
        yield from measure(case, *args, **kwargs)

    monkeypatch.setattr(kernels_command, "measure", stops)
    saved = tmp_path / "rows.json"
    code, out, _ = run(*QUICK, "--json", str(saved))
    assert code == 130 and "interrupted" in out
    rows = json.loads(saved.read_text())["results"]
    assert {row["batch"] for row in rows} == {1}


@pytest.mark.parametrize(("command", "stop"), [("generate", 5), ("generate", 1), ("engine", 4)])
def test_interrupt_keeps_the_samples_of_a_workload(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, stop: int
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


def test_allocator_command(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict(list(allocator_code.CALLS.items())[:2])
    monkeypatch.setattr(allocator_code, "CALLS", few)
    saved = tmp_path / "rows.json"
    options = ("allocator", "--num-blocks", "200000", "--repeats", "3", "--seconds", "0.05")
    code, out, err = run(*options, "--json", str(saved))
    assert code == 0, err
    assert "fork of 1,000 tokens" in out
    rows = json.loads(saved.read_text())["results"]
    assert {row["where"] for row in rows} == {"in C++", "call"}
    assert run(*options, "--compare", str(saved))[0] == 0


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


def test_durations() -> None:
    shown = [duration(seconds) for seconds in (2.5, 3.1e-3, 4.35e-6, 45e-9, None)]
    assert shown == ["2.5 s", "3.1 ms", "4.35 us", "45 ns", ""]


def test_peers_that_cannot_run_say_why() -> None:
    case = Case("decode", SMALL, torch.float32, 1, 32)
    workload = kernels.Workload(case, [16], peers=("sdpa-backends", "flashinfer"))
    assert workload.missing == {"sdpa-backends": "needs a GPU", "flashinfer": "needs a GPU"}

    monkeypatch = pytest.MonkeyPatch()
    library = ModuleType("flashinfer")
    library.__spec__ = ModuleSpec("flashinfer", None)
    library.BatchDecodeWithPagedKVCacheWrapper = SimpleNamespace  # takes no such arguments
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    half = kernels.Workload(Case("decode", SMALL, torch.bfloat16, 1, 32), [16])
    half.device = SimpleNamespace(type="cuda")
    with pytest.raises(Missing, match="does not run here"):
        peers.flashinfer(half)
    monkeypatch.undo()

    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no compiler\nlong story")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *args, **kwargs: broken)
        with pytest.raises(Missing, match=r"does not run here: no compiler$"):
            peers.flex(workload)


@pytest.mark.parametrize(
    ("phase", "batch", "length"), [("decode", 1, 64), ("decode", 3, 70), ("prefill", 2, 40)]
)
def test_paged_attention_of_transformers_is_a_checked_contender(
    monkeypatch: pytest.MonkeyPatch, phase: str, batch: int, length: int
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**17)
    case = Case(phase, SMALL, torch.float32, batch, length)
    workload = kernels.Workload(case, [16], peers=("transformers",))
    assert workload.missing == {} and workload.copies > 2
    workload.check()
    right = workload.contenders["transformers paged"](0)
    assert right.shape == (batch * case.query_len, 4, 16)
    workload.contenders["transformers paged"] = lambda call: 1.01 * right
    with pytest.raises(WrongResult, match="transformers paged is off by"):
        workload.check()


def test_paged_attention_of_transformers_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("decode", SMALL, torch.float32, 2, 32)
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**14)
    monkeypatch.setattr(transformers_paged, "MOST_CALL_SECONDS", 0)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"].endswith("s a call in decode gqa fp32 B=2 L=32")
    monkeypatch.setattr(transformers_paged, "MOST_MASK_ELEMENTS", 8)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"].startswith("would need a mask of 2 x 64 in decode")
    monkeypatch.setattr(transformers_paged, "paged", lambda workload: 1 / 0)
    missing = kernels.Workload(case, [16], peers=("transformers",)).missing
    assert missing["transformers"] == "does not run here: division by zero"


def test_every_reason_of_a_missing_peer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**14)
    monkeypatch.setattr(kernels, "_timed", lambda *args: [])
    monkeypatch.setattr(transformers_paged, "MOST_MASK_ELEMENTS", 8)
    missing: dict[str, str] = {}
    for length in (32, 64, 64):
        case = Case("decode", SMALL, torch.float32, 1, length)
        names = ("transformers", "flashinfer")
        list(kernels.measure(case, [16], [1], 0.0, peers=names, missing=missing))
    assert missing["flashinfer"] == "needs a GPU"
    assert missing["transformers"].count("would need a mask") == 2


@pytest.mark.slow
def test_flex_is_a_checked_contender_and_never_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    for length in (160, 192):  # the second is beyond the limit, had the first not been forgotten
        case = Case("decode", SMALL, torch.float32, 1, length)
        workload = kernels.Workload(case, [16], peers=("flex",))
        if "flex" in workload.missing:
            pytest.skip(workload.missing["flex"])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="flex_attention called without")
            workload.check()
        assert "flex" in workload.contenders


def test_chunks_are_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**16)
    case = Case("chunk", SMALL, torch.float32, 2, 100, 30)
    kernels.Workload(case, [16]).check()
    assert case.flops == 4 * 2 * sum(range(71, 101)) * 4 * 16


def test_plots_need_no_more_than_one_kind(tmp_path: Path) -> None:
    row = {"phase": "prefill", "heads": "gqa", "dtype": "bf16", "batch": 1, "length": 64}
    row |= {"threads": 1, "contender": "paged 16", "intensity": 100.0, "gflop_per_second": 50.0}
    row |= {"gb_per_second": 1.0, "peak": 1e11}
    assert [path.name for path in plots.plot_kernels([row], tmp_path)] == ["roofline.png"]


def kernel_row(contender: str, batch: int, length: int) -> dict:
    row = {"phase": "decode", "heads": "gqa", "dtype": "bf16", "batch": batch, "length": length}
    row |= {"threads": 1, "contender": contender, "intensity": 2.0, "gflop_per_second": 50.0}
    return row | {"gb_per_second": 9.0 + batch, "peak": 2e10, "device": "cpu"}


def test_no_two_contenders_look_the_same() -> None:
    names = ["sdpa", "folded", "flex", *(f"paged {2**i}" for i in range(9))]
    names += [f"paged {2**i} triton" for i in range(9)]
    looks = plots.looks_of([kernel_row(name, 1, 64) for name in names])
    assert len({(look.colour, look.face, look.rim) for look in looks.values()}) == len(names)
    assert len({(look.colour, look.line) for look in looks.values()}) == len(names)


def test_labels_of_the_roofline_stay_inside() -> None:
    prefill = kernel_row("paged 16", 1, 64) | {"phase": "prefill", "intensity": 4000.0}
    rows = [kernel_row("paged 16", 1, 64), prefill | {"peak": 1e11}]
    figure = plots.draw_roofline(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])
    for box in boxes:
        assert inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0


def test_contexts_are_an_axis() -> None:
    """A panel a batch; batches of one context have none."""
    sizes = ((1, 1024), (1, 4096), (8, 1024), (8, 4096), (32, 4096))
    figure = plots.draw_contexts([kernel_row("paged 16", *size) for size in sizes])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "gqa bf16, 1 row", "gqa bf16, 8 rows"
    ]  # fmt: skip
    for axes in figure.axes:
        assert axes.lines[0].get_xdata().tolist() == [1024, 4096] and axes.get_xscale() == "log"
    assert "context" in figure.get_supxlabel()
    assert plots.draw_contexts([kernel_row("paged 16", b, 4096) for b in (1, 8)]) is None


def test_waste_by_formula_is_drawn_where_it_holds() -> None:
    rows = [kernel_row(f"paged {size}", 1, 64) for size in (16, 64, 128, 256)]
    waste = plots.draw_block_sizes(rows).axes[1]
    assert "formula" in waste.get_title(loc="left") and "formula" in waste.get_ylabel()
    assert waste.lines[0].get_label() == "100 tokens a row"
    assert waste.lines[0].get_xdata().tolist() == [16, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--threads", "0"), "--threads must be positive integers"),
        (("kernels", "--phases", "encode"), "--phases knows decode, prefill, got 'encode'"),
        (("kernels", "--peers", "mine"), "--peers knows flex"),
        (("kernels", "--device", "tpu"), "--device must be cpu or cuda"),
        (("kernels", "--device", "cpu", "--wgmma"), "--wgmma needs a Hopper GPU"),
        (("kernels", "--json", "/no/such/folder/x"), "--json: there is no folder"),
        (("kernels", "--compare", "/no/such/file"), "--compare: /no/such/file cannot be read"),
        (("kernels", "--fail-above", "1.1"), "--fail-above needs --compare"),
        (("kernels", "--seconds", "nan"), "--seconds must be more than 0"),
        (("kernels", "--block-sizes", "999999999"), "GiB are free"),
        (("kernels", "--plot", "/proc/x"), "--plot: /proc/x is no folder"),
        (("allocator", "--seconds", "-1"), "--seconds must be more than 0"),
        (("allocator", "--json", "/tmp"), "--json: /tmp is a folder"),
        (("allocator", "--json", ""), "--json needs the name of a file"),
        (("allocator", "--json", "/proc/x"), "--json: /proc/x cannot be written"),
        (("engine", "--workload", "x"), "--workload is one of"),
        (("engine", "--capacity", "--overhead"), "two measurements"),
        (("generate", "--workload", "x"), "--workload is one of"),
        (("allocator", "--num-blocks", "3"), "200000"),
        (("prefix", "--trace", "nothing"), "nothing"),
        (("nothing",), "nothing"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1


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


def test_other_sizes_are_not_compared(run, small, tmp_path: Path) -> None:
    row = {"where": "call", "operation": "x", "timing": {"median": 1.0}}
    default, few = ([row | {"num_blocks": n}] for n in (1_000_000, 200_000))
    assert dict(times_of([row])).keys() == dict(times_of(default)).keys()
    assert not dict(times_of(default)).keys() & dict(times_of(few)).keys()
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"environment": {}, "results": [row]}))
    code, out, _ = run(*QUICK, "--compare", str(path), "--fail-above", "1.1")
    assert code == 1 and "nothing to judge by" in out
    assert run(*QUICK, "--compare", str(path))[0] == 0


@pytest.mark.parametrize("command", ["kernels", "engine", "generate", "allocator", ""])
def test_help_has_an_example(run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and "Example: python -m pykvcache bench" in out
