"""Requests of packaged traces, synthetic ones and files of the user; bad rows are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pykvcache.bench.replay.workload import Survey, Workload
from pykvcache.bench.traces import Request


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


def test_trace_of_the_user(run, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("arrival,input_length,output_length\n" + "0.5,30,20\n" * 50)
    code, out, _ = run("--trace", str(path), "--tokens", "1000", "--arrivals", "trace")
    assert code == 0
    assert "50 requests, mean 30 tokens in and 20 out, longest 50" in out


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


def test_arrivals_of_packaged_traces(run_small) -> None:
    for trace in ("azure-conv", "azure-code", "mooncake-conv"):
        code, out, _ = run_small(
            *("--trace", trace, "--policy", "paged", "--block-size", "16"),
            *("--arrivals", "trace", "--memory", "40GiB", "--json", "-"),
        )
        assert code == 0
        assert json.loads(out)[0]["peak_batch"] < 120


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


def test_prefixes_whose_ids_agree_in_their_low_bits_are_not_shared(run, tmp_path: Path) -> None:
    trace = tmp_path / "a.jsonl"
    rows = [
        {"input_length": 512, "output_length": 1, "hash_ids": [7 + i * 2**31 * 2**32]}
        for i in range(10)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = ("--prefix-cache", "--policy", "paged", "--block-size", "16", "--tokens", "40960")
    code, out, err = run("--trace", str(trace), *options, "--json", "-")
    assert code == 0, err
    assert json.loads(out)[0]["prefix_hit"] == 0
