"""The command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tune_samples import SPEC, explain, write

from pykvcache import launch_table
from pykvcache.bench import kernels, tensors
from pykvcache.bench.cases import Case as Call
from pykvcache.bench.cases import Heads
from pykvcache.bench.tune import measure, plan
from pykvcache.bench.tune import plots as tune_plots
from pykvcache.bench.tune.explain import CallSpec, Explanation
from pykvcache.bench.tune.search import DEFAULT
from pykvcache.bench.tune.shapes import load_shape


@pytest.fixture
def run(run_command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run `pykvcache tune ...` over small memory: (exit code, standard output, standard error)."""
    monkeypatch.setattr(measure, "COLD_BYTES", 2**24)
    monkeypatch.setattr(measure, "CALL_BYTES", 2**20)
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(plan, "read_bandwidth", lambda device: 2e10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return partial(run_command, "tune")


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


def test_tune_interrupted_before_it_has_anything(run, monkeypatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run_case", stop)
    code, out, err = run(*QUICK, "--json", "-")
    assert code == 130 and json.loads(out)["results"] == [] and "before anything" in err
    monkeypatch.setattr(kernels.Workload, "check", stop)
    code, out, err = run("--explain", "L=300,HQ=8,HKV=2,D=64", "--device", "cpu", "--json", "-")
    assert code == 130 and json.loads(out)["results"] == []
    assert "nothing is kept of one call" in err


def test_a_tiny_call_in_large_blocks_takes_little_memory() -> None:
    """Its copies were so many that their blocks were 68 GB."""
    case = Call("decode", Heads("call", 1, 1, 64), torch.bfloat16, 1, 1)
    copies = tensors.count_copies(case, [256])
    assert copies * tensors.pool_bytes(case, 256) <= tensors.MOST_POOL_BYTES
    assert tensors.count_copies(case, [16]) <= tensors.MOST_COPIES
    ordinary = Call("decode", Heads("gqa", 32, 8, 128), torch.bfloat16, 1, 1024)
    assert tensors.count_copies(ordinary, [16, 32, 64]) == 64


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
        (("--little-waste", "nan"), "little_waste must be 0 to 100"),
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
        (("--explain", "L=1", "--exhaustive"), "--exhaustive is for a tuning run"),
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


def test_what_tune_reads_is_not_written_over(run, tmp_path: Path) -> None:
    trace, config, table = (tmp_path / name for name in ("a.csv", "config.json", "launch.json"))
    trace.write_text("input_length,output_length\n10,5\n")
    config.write_text("{}")
    for option, file in (("--trace", trace), ("--model-config", config)):
        code, _, err = run(*QUICK, option, str(file), "--json", str(file))
        assert code == 2 and f"--json and {option} are the same file" in err
    code, _, err = run(*QUICK, "--out", str(table), "--json", str(table))
    assert code == 2 and "--json and --out are the same file" in err
    assert trace.read_text().startswith("input_length") and config.read_text() == "{}"


def test_a_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields), "utf-8-sig")
    assert load_shape(str(tmp_path), "bf16").head_dim == 16
