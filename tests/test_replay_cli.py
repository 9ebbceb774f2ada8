"""`python -m pykvcache replay`: rows, sentences, pictures, wrong arguments, Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pykvcache.bench.replay import blockmap, paper, plots
from pykvcache.bench.replay import plan as plan_module
from pykvcache.bench.replay.cases import BLOCK_SIZES, CONTIGUOUS, POLICIES, Case
from pykvcache.bench.replay.configs import known_configs, load_config
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.report import compared, regime, replay_tables
from pykvcache.bench.replay.totals import BESIDE, KEYS, SHARES
from pykvcache.bench.replay.workload import Workload

SMALL = ("--requests", "120")


@pytest.fixture
def run(run_command):
    """Run `pykvcache replay ...`: (exit code, standard output, standard error)."""
    return partial(run_command, "replay")


def test_all_policies_as_json(run) -> None:
    code, out, err = run(
        *SMALL, "--memory", "8GiB", "--model-config", "llama-3.1-8b", "--json", "-"
    )
    rows = json.loads(out)
    assert code == 0
    assert [row["policy"] for row in rows] == [*CONTIGUOUS, "padded", *["paged"] * len(BLOCK_SIZES)]
    assert [row["block_size"] for row in rows if row["policy"] == "paged"] == list(BLOCK_SIZES)
    for row in rows:
        assert tuple(row) == (*KEYS, *BESIDE)
        assert sum(row[name] for name in SHARES) == 100
        assert row["throughput"] > 0
    assert "65,536 token slots (8 GiB of llama-3.1-8b, 128 KiB a token)" in err
    assert "oracle-first-fit" in err and "Better packing" in err


def test_table_and_file(run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    code, out, err = run(
        *(*SMALL, "--trace", "azure-code", "--tokens", "20000", "--policy", "max,paged"),
        *("--block-size", "16", "--block-size", "64,1", "--json", str(rows)),
    )
    assert code == 0 and err == ""
    assert "paged 64" in out and "20,000 token slots" in out and "padded" not in out
    assert [row["block_size"] for row in json.loads(rows.read_text())] == [None, 16, 64, 1]


def test_head_room_changes_what_stays_free(run) -> None:
    external = []
    for share in ("0", "0.3"):
        arguments = ("--policy", "paged", "--block-size", "16", "--tokens", "30000", "--json", "-")
        _, out, _ = run(*SMALL, *arguments, "--head-room", share)
        external.append(json.loads(out)[0]["external"])
    assert external[1] > external[0] + 15


def test_cost_of_a_step_changes_time_and_not_order(run) -> None:
    rows = []
    for step in ("6", "12"):
        arguments = ("--policy", "max", "--tokens", "30000", "--kv-ns", "0", "--prefill-us", "0")
        _, out, _ = run(*SMALL, *arguments, "--step-ms", step, "--json", "-")
        rows.append(json.loads(out)[0])
    assert rows[0]["throughput"] == pytest.approx(2 * rows[1]["throughput"])
    assert rows[0]["live"] == pytest.approx(rows[1]["live"])


@pytest.mark.parametrize(("share", "words"), [("1", "hardly raises"), ("0", "greatly raises")])
def test_the_regime_is_computed(run, share: str, words: str) -> None:
    """Packing pays where the fixed cost of a step dominates, and not where prefill does."""
    prefill = "1000" if share == "1" else "0"
    _, out, _ = run(*SMALL, "--policy", "max,paged", "--block-size", "16", "--prefill-us", prefill)
    assert words in out
    named = "computing prompts" if share == "1" else "the fixed cost of a step"
    assert f"goes to {named}" in out


def test_no_sentence_without_both_sides(run) -> None:
    plan = Plan.of(Workload("azure-conv", limit=30), Budget(20_000), paper.Rules(), ["paged"], [16])
    assert regime(list(plan.run())) is None


def test_pictures(run, tmp_path: Path) -> None:
    picture = tmp_path / "replay.png"
    code, out, _ = run(*SMALL, "--tokens", "20000", "--plot", str(picture))
    assert code == 0 and f"plot: {picture}" in out.replace("\n", "")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1200


def test_padded_alone_has_no_map(run, tmp_path: Path) -> None:
    picture = tmp_path / "padded.png"
    assert run(*SMALL, "--policy", "padded", "--plot", str(picture))[0] == 0
    assert picture.exists()


@pytest.mark.parametrize("case", [*map(Case, CONTIGUOUS), Case("paged", 16)])
def test_maps_show_the_shares(case: Case) -> None:
    workload = Workload("sharegpt-like", max_len=2048, limit=1500)
    plan = Plan.of(workload, Budget(15_728), paper.Rules(), [case.policy], [16])
    drawn = blockmap.draw_map(plan, case, 60.0, 15_728)
    shares = next(plan.run()).shares()
    for kind, name in enumerate(SHARES):
        assert 100 * np.mean(drawn.cells == kind) == pytest.approx(shares[name], abs=8), name


def test_map_of_the_engine_shows_its_scheduler() -> None:
    """Two rows at most: the common loop would fill the memory."""
    rules = paper.Rules(scheduler="engine", max_running=2)
    workload = Workload("sharegpt-like", max_len=2048, limit=60)
    plan = Plan.of(workload, Budget(15_728), rules, ["paged"], [16])
    result = next(plan.run())
    drawn = blockmap.draw_map(plan, plan.cases[0], result.seconds.total, 15_728)
    for kind, name in enumerate(SHARES):
        share = result.shares()[name]
        assert 100 * np.mean(drawn.cells == kind) == pytest.approx(share, abs=1.5), name


def test_columns_of_a_map_are_moments(tmp_path: Path) -> None:
    """One request at a time, 5 s each: a prompt of 10 tokens and 4 more, one a second."""
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n" + "10,5\n" * 1000)
    rules = paper.Rules(StepCost(1.0, 0.0, 0.0))
    plan = Plan.of(Workload(str(path), max_len=16), Budget(16), rules, ["max"])
    drawn = blockmap.draw_map(plan, plan.cases[0], 2640.0, 16)  # 11 s a column
    moments = (np.arange(blockmap.COLUMNS) + 0.5) * 11
    slots = np.arange(blockmap.LINES) * 16 // blockmap.LINES
    length = 10 + np.floor(moments % 5).astype(int)
    expected = np.select(
        [slots[:, None] < length, slots[:, None] < 14], [blockmap.LIVE, blockmap.RESERVED],
        blockmap.INTERNAL,
    )  # fmt: skip
    assert np.array_equal(drawn.cells, expected)


def test_maps_share_time_and_slots_and_leave_out_what_is_never_used(tmp_path: Path) -> None:
    workload = Workload("sharegpt-like", limit=60)
    plan = Plan.of(workload, Budget(10**7), paper.Rules(), ["max", "oracle", "paged"], [16])
    results = list(plan.run())
    seconds = plots.seconds_of(plan, results)
    assert seconds == max(result.seconds.total for result in results)
    maps = blockmap.draw_maps(plan, plan.cases, seconds)
    assert len({(drawn.seconds, drawn.slots) for drawn in maps}) == 1
    assert max(drawn.used for drawn in maps) > blockmap.LINES // 2


def test_a_map_of_few_slots_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n3,4\n2,5\n4,4\n")
    plan = Plan.of(Workload(str(path)), Budget(65_536), paper.Rules(), ["max", "paged"], [1])
    maps = blockmap.draw_maps(plan, plan.cases, plots.seconds_of(plan, list(plan.run())))
    assert maps[0].slots < 40 and maps[0].unit == 1
    assert max(drawn.used for drawn in maps) > blockmap.LINES // 2


def test_long_names_leave_room_for_the_rest_of_the_title(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200 + ".csv")
    path.write_text("input_length,output_length\n10,5\n")
    title = plots.title_of(Plan.of(Workload(str(path)), Budget(100), paper.Rules()))
    assert len(title) < 140 and title.endswith(".csv, 1 request, 100 token slots, max-len 15")


@pytest.mark.parametrize("tokens", ["1", "2", "7"])
def test_budgets_that_hold_next_to_nothing(run, tokens: str) -> None:
    code, out, _ = run(*SMALL, "--tokens", tokens, "--json", "-")
    assert code == 0
    for row in json.loads(out):
        assert sum(row[name] for name in SHARES) == 100
        assert row["block_size"] is None or row["block_size"] <= int(tokens)


def test_trace_of_the_user(run, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("arrival,input_length,output_length\n" + "0.5,30,20\n" * 50)
    code, out, _ = run("--trace", str(path), "--tokens", "1000", "--arrivals", "trace")
    assert code == 0
    assert "50 requests, mean 30 tokens in and 20 out, longest 50" in out


def test_arrivals_of_packaged_traces(run) -> None:
    for trace in ("azure-conv", "azure-code", "mooncake-conv"):
        code, out, _ = run(
            *(*SMALL, "--trace", trace, "--policy", "paged", "--block-size", "16"),
            *("--arrivals", "trace", "--memory", "40GiB", "--json", "-"),
        )
        assert code == 0
        assert json.loads(out)[0]["peak_batch"] < 120


def test_enough_memory_is_no_waste(run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    _, out, _ = run(
        *("--trace", "azure-conv", "--requests", "20", "--arrivals", "trace"),
        *("--policy", "paged", "--block-size", "16", "--memory", "80GiB", "--json", str(rows)),
    )
    assert "no request ever waited" in out
    (row,) = json.loads(rows.read_text())
    assert tuple(row) == (*KEYS, *BESIDE, "shares_of") and row["shares_of"] == "allocated"


def test_the_regime_compares_the_same_time() -> None:
    """Rows of 10 tokens in slots of 20; paged, nobody waits."""
    plan = Plan.of(
        Workload("alpaca-like", limit=200), Budget(65_536), paper.Rules(), ["max", "paged"], [16]
    )
    loose, packed = plan.run()
    assert loose.waiting.seconds and not packed.waiting.seconds
    rows_seconds = [result.waiting.rows + result.calm.rows for result in (loose, packed)]
    running = [result.seconds.total for result in (loose, packed)]
    _, batches = compared(loose, packed)
    assert batches == pytest.approx([a / b for a, b in zip(rows_seconds, running, strict=True)])
    sentence = regime([loose, packed])
    assert "of the allocated memory live" in sentence and "nobody waits for paged 16" in sentence
    assert f"{batches[0]:.1f} -> {batches[1]:.1f}" in sentence


@pytest.mark.parametrize("width", [120, 80, 60, 40, 25])
def test_no_figure_is_cut_in_a_narrow_terminal(width: int) -> None:
    workload = Workload("azure-conv", limit=60)
    plan = Plan.of(workload, Budget(30_000), paper.Rules(), ["max", "oracle-first-fit", "paged"])
    results = list(plan.run())
    regimes = [paper.Regime(f"sigma {i}", results[-4:]) for i in range(6)]
    console = Console(width=width, file=io.StringIO())
    made = replay_tables(results, width)
    for table in [*made, *paper.paper_tables(regimes, width)]:
        console.print(table)
    text = console.file.getvalue()
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    words = text.split()
    for result in results:
        assert set(result.printed_shares().values()) < set(words)
        assert f"{result.mean_batch:.1f}" in words
        assert f"{result.throughput:,.0f}" in words and result.policy in words
    assert {"live", "reserved", "external", "preempt", "tokens/s", "published"} <= set(words)
    assert len(made) == {120: 2, 80: 3}.get(width, len(made))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "azure"], ["trace", "azure-conv", "sharegpt-like", "'azure'"]),
        (["--model-config", "llama-9"], ["llama-3.1-8b", "qwen3-8b", "'llama-9'"]),
        (["--policy", "best"], ["policy", "max-length", "paged", "'best'"]),
        (["--tokens", "0"], ["tokens", "1", "0"]),
        (["--memory", "0"], ["memory", "0 bytes"]),
        (["--memory", "lots"], ["memory", "'lots'"]),
        (["--memory", "1KiB"], ["1024 bytes", "131072 bytes"]),
        (["--memory", "1GiB", "--tokens", "5"], ["not both"]),
        (["--tokens", "9" * 25], ["tokens", "134217728"]),
        (["--memory", "1000000GiB"], ["memory", "134217728"]),
        (["--memory", "9" * 400 + "GiB"], ["memory"]),
        (["--memory", ""], ["memory", "''"]),
        (["--model-config", ""], ["model config", "''"]),
        (["--tokens", "100000", "--model-config", "nope"], ["model config", "'nope'"]),
        (["--paper", "--trace", "sharegpt"], ["--paper", "--trace"]),
        (["--paper", "--tokens", "100"], ["--paper", "--tokens"]),
        (["--block-size", "16,16"], ["block_size", "16,16"]),
        (["--max-len", "1"], ["max_len", "1"]),
        (["--max-len", "100000"], ["max_len", "65536", "100000"]),
        (["--block-size", "0"], ["block_size", "0"]),
        (["--block-size", "big"], ["block_size", "'big'"]),
        (["--tokens", "10", "--block-size", "16"], ["block_size 16", "10"]),
        (["--head-room", "1"], ["head_room", "1"]),
        (["--victim", "oldest"], ["victim", "newest", "'oldest'"]),
        (["--preemption", "kill"], ["preemption", "swap", "'kill'"]),
        (["--buddy-rest", "half"], ["buddy_rest", "used", "'half'"]),
        (["--order", "lifo"], ["order", "shortest", "'lifo'"]),
        (["--scheduler", "best"], ["scheduler", "engine", "'best'"]),
        (["--requests", "0"], ["requests", "0"]),
        (["--arrivals", "poisson"], ["arrivals", "saturated", "'poisson'"]),
        (["--trace", "sharegpt", "--arrivals", "trace"], ["sharegpt", "arrive"]),
        (["--prefix-cache"], ["azure-conv", "prefixes"]),
        (["--prefix-cache", "--scheduler", "prefill-first"], ["--prefix-cache", "engine"]),
        (["--scheduler", "engine", "--preemption", "swap"], ["engine", "--preemption swap"]),
        (["--scheduler", "engine", "--victim", "newest"], ["engine", "--victim newest"]),
        (["--step-ms", "-1"], ["step_ms", "-1"]),
        (["--step-ms", "0"], ["step_ms", "0"]),
        (["--kv-ns", "nan"], ["kv_ns", "nan"]),
        (["--trace", "alpaca-like", "--sigma", "-1"], ["sigma", "-1"]),
        (["--plot", "a.txt"], ["--plot", ".png", "'a.txt'"]),
        (["--json", "/"], ["--json", "folder"]),
        (["--plot", "/no/such/folder/a.png"], ["--plot", "/no/such/folder"]),
        (["--json", "/no/such/folder/a.json"], ["--json", "/no/such/folder"]),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments: list[str], words: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pykvcache: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "input_length,other\n1,2\n", ["a.csv", "columns", "other"]),
        ("a.csv", "input_length,output_length\n1,2\n3,-4\n", ["a.csv, line 3", "'-4'"]),
        ("a.csv", "", ["a.csv", "columns"]),
        ("a.csv", "input_length,output_length\n", ["no requests"]),
        ("a.jsonl", '{"input_length": 5}\n', ["a.jsonl, line 1", "output_length"]),
        ("a.csv", "arrival,input_length,output_length\nsoon,1,1\n", ["line 2", "'soon'"]),
        ("a.csv.gz", "this is no gzip", ["a.csv.gz"]),
        ("a.csv", "input_length,output_length\n1,2\n\udcff,4\n", ["a.csv, line 3", "UTF-8"]),
        ("a.txt", "input_length,output_length\n1,2\n", [".csv", ".jsonl", "a.txt"]),
        ("a.jsonl", '{"input_length": 1.9, "output_length": 5}\n', ["line 1", "1.9"]),
        ("a.jsonl", '{"input_length": -0.5, "output_length": 5}\n', ["line 1", "-0.5"]),
        ("a.jsonl", '{"input_length": 3, "output_length": true}\n', ["line 1", "output", "True"]),
        ("a.jsonl", '{"input_length": NaN, "output_length": 5}\n', ["line 1", "nan"]),
        (
            "a.jsonl",
            '{"input_length": 1, "output_length": 5, "hash_ids": [1.5]}\n',
            ["line 1", "hash_ids"],
        ),
        ("a.jsonl", "[" * 200_000 + "\n", ["line 1", "JSON object"]),
        ("a.jsonl", "[1]\n", ["line 1", "JSON object", "ContextTokens"]),
        ("a.csv", "input_length,output_length\n1_000,2\n", ["line 2", "'1_000'"]),
        ("a.csv", "input_length,output_length\n\u0661,2\n", ["line 2", "prompt"]),
        ("a.csv", "input_length,output_length\n1.5,2\n", ["line 2", "'1.5'"]),
        ("a.csv", "input_length,output_length,input_length\n1,2,3\n", ["line 1", "2 times"]),
        ("a.csv", "arrival,input_length,output_length\n1_0,1,1\n", ["line 2", "'1_0'"]),
    ],
)
def test_bad_traces_are_one_line(
    run, tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8", "surrogateescape")
    code, out, err = run("--trace", str(path))
    assert (code, out) == (2, "")
    assert err.startswith("pykvcache: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bom.csv", "\ufeffinput_length,output_length\n10,5\n"),
        ("UP.CSV", "input_length,output_length\n10,5\n"),
        ("bom.jsonl", '\ufeff{"input_length": 10, "output_length": 5}\n'),
        ("empty.jsonl", '{"input_length": 10, "output_length": 5}\n\n'),
        ("float.csv", "input_length,output_length\n10.0,+5\n"),
        ("azure.jsonl", '{"ContextTokens": 10, "GeneratedTokens": 5}\n'),
        ("burst.jsonl", '{"Request tokens": 10, "Response tokens": 5}\n'),
        ("float.jsonl", '{"input_length": 10.0, "output_length": 5}\n'),
    ],
)
def test_traces_as_other_programs_write_them(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    assert [(r.prompt, r.output) for r in Workload(str(path))] == [(10, 5)]


def test_files_are_found_bad_before_the_work_and_stay_as_they_are(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_module, "run_case", None)
    for option, file in (
        ("--json", "/proc/x.json"),
        ("--json", ""),
        ("--json", str(tmp_path / ("n" * 300))),
        ("--plot", "/proc/x.png"),
    ):
        code, out, err = run(*SMALL, option, file)
        assert (code, out) == (2, "") and err.count("\n") == 1 and option in err
    trace, link, same = (tmp_path / name for name in ("a.csv", "link.json", "same.png"))
    trace.write_text("input_length,output_length\n10,5\n")
    link.symlink_to(trace)
    for option, file in (("--json", trace), ("--json", link)):
        code, out, err = run("--trace", str(trace), option, str(file))
        assert (code, out) == (2, "") and "--json and --trace are the same file" in err
    code, _, err = run(*SMALL, "--json", str(same), "--plot", str(same))
    assert code == 2 and "--json and --plot are the same file" in err
    assert trace.read_text().startswith("input_length") and not same.exists()
    link.unlink()
    link.symlink_to(tmp_path / "target.json")
    run(*SMALL, "--json", str(link), "--tokens", "0")
    assert link.is_symlink() and not link.exists()
    link.unlink()
    trace.unlink()
    old = tmp_path / "old.json"
    old.write_text("old")
    run(*SMALL, "--json", str(old), "--plot", str(tmp_path / "new.png"), "--tokens", "0")
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_json_follows_a_link_that_leads_nowhere_yet(run, tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    assert run(*SMALL, "--policy", "max", "--json", str(link))[0] == 0
    assert link.is_symlink() and len(json.loads(target.read_text())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_the_table_is_shown(run) -> None:
    code, out, err = run(*SMALL, "--policy", "max", "--json", "/dev/full")
    assert code == 1 and "max-length" in out
    assert err.startswith("pykvcache: ") and err.count("\n") == 1 and "--json" in err


def test_arrivals_that_go_back_are_an_error(run, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arrival,input_length,output_length\n5,9,9\n4,9,9\n")
    code, out, err = run("--trace", str(path), "--arrivals", "trace")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "a.csv, line 3: arrives 1 s before" in err
    assert run("--trace", str(path), "--policy", "paged", "--block-size", "16")[0] == 0


def test_a_row_without_arrival_has_its_line_number(run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = '{"input_length": 5, "output_length": 5'
    path.write_text(f'{row}, "arrival": 1}}\n{row}}}\n')
    code, out, err = run("--trace", str(path), "--arrivals", "trace")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "a.jsonl, line 2: does not say when it arrives" in err
    assert run("--trace", str(path), "--policy", "max")[0] == 0


def test_ctrl_c_keeps_what_is_done(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_case = plan_module.run_case

    def interrupted(case: Case, *arguments):
        if case.policy == "oracle-buddy":
            raise KeyboardInterrupt
        return run_case(case, *arguments)

    monkeypatch.setattr(plan_module, "run_case", interrupted)
    rows = tmp_path / "rows.json"
    code, out, err = run(*SMALL, "--json", str(rows))
    assert code == 130 and err == "pykvcache: interrupted\n"
    assert "oracle-first-fit" in out and "oracle-buddy" not in out
    assert len(json.loads(rows.read_text())) == 3


def test_paper_prints_published_figures_beside(run) -> None:
    code, out, _ = run("--paper", "--requests", "300")
    assert code == 0
    assert "15,728 token slots (12 GiB of opt-13b, 800 KiB a token); max-len 2,048" in out
    for published in paper.PUBLISHED.values():
        assert str(published) in out
    assert "sigma 1.4" in out and "Alpaca" in out and "waste of allocated" in out


def test_help_has_an_example_and_every_option(run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "Example: python -m pykvcache replay" in out
    for option in ("trace", "memory", "model-config", "tokens", "max-len", "policy", "block-size"):
        assert f"--{option}" in out
    for option in ("head-room", "requests", "arrivals", "plot", "json", "step-ms", "paper"):
        assert f"--{option}" in out


def test_configs_are_whole_and_known_sizes_come_out() -> None:
    for name in known_configs():
        assert load_config(name).token_bytes > 0
    assert load_config("llama-3.1-8b").token_bytes == 128 * 1024
    assert load_config("opt-13b").token_bytes == 800 * 1024
    assert load_config("deepseek-v3").token_bytes == 61 * 576 * 2
    assert POLICIES[-1] == "paged"


def test_config_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"n_layer": 3, "n_head": 4, "n_embd": 32}', "utf-8")
    assert load_config(str(path)).token_bytes == 3 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "hidden_size": 64,
                "num_key_value_heads": 2,
            },
            2 * 2 * 2 * 8 * 2,
        ),
        ({"n_layer": 3, "n_head": 4, "n_embd": 32, "torch_dtype": "float32"}, 3 * 2 * 32 * 4),
        (
            {
                "text_config": {
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "head_dim": 16,
                    "num_key_value_heads": 1,
                }
            },
            2 * 16 * 2,
        ),
        ({"num_hidden_layers": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 576 * 2),
    ],
)
def test_config_files(tmp_path: Path, fields: dict, expected: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(str(tmp_path)).token_bytes == expected
    assert load_config(str(tmp_path / "config.json")).token_bytes == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "must be a JSON object"),
        ('{"num_hidden_layers": 2}', "num_attention_heads"),
        ('{"num_hidden_layers": "two"}', "positive integer"),
        (
            '{"n_layer": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "dtype": "int3"}',
            "dtype",
        ),
        ('{"num_hidden_layers": 1, "kv_lora_rank": 8}', "qk_rope_head_dim"),
    ],
)
def test_bad_config_files(run, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = run("--model-config", str(path))
    assert code == 2 and words in err and err.count("\n") == 1
