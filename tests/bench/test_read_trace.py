"""Reading traces: the packaged ones are whole, rows of the user's are right or named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pykvcache.bench.traces import FOLDER, TRACES, Request, read_trace

ROWS = {"azure-code": 8_819, "azure-conv": 19_366, "mooncake-conv": 12_031, "sharegpt": 30_731}
LONGEST = {"azure-code": 7_841, "azure-conv": 14_089, "mooncake-conv": 126_527, "sharegpt": 8_149}


@pytest.mark.parametrize("name", TRACES)
def test_packaged_traces_are_whole(name: str) -> None:
    requests = list(read_trace(name))
    assert len(requests) == ROWS[name]
    assert max(request.prompt + request.output for request in requests) == LONGEST[name]


def test_every_packaged_trace_has_source_and_licence() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert len(list((FOLDER / "LICENSES").iterdir())) == 3
    for file in TRACES.values():
        assert f"`{file}`" in readme


def test_traces_of_the_user(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("other,output_length,input_length\nx,2,1\ny,4,3\n")
    lines = tmp_path / "mine.jsonl.gz"
    with gzip.open(lines, "wt") as file:
        file.write(
            '{"input_length": 1, "output_length": 2}\n{"input_length":3,"output_length":4}\n'
        )
    assert list(read_trace(table)) == list(read_trace(lines)) == [Request(1, 2), Request(3, 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "input_length,other\n1,2\n", "a.csv must have the columns .*input_length,other"),
        ("a.csv", "input_length,output_length\n1,2\n3,-4\n", "line 3: output .* got '-4'"),
        ("a.csv", "input_length,output_length\n1\n", "line 2: output .* got None"),
        ("a.jsonl", '{"input_length": 1, "output_length": 2}\n{}\n', "a.jsonl, line 2: must be"),
        ("a.jsonl", '{"input_length": "x", "output_length": 2}\n', "line 1: prompt .* got 'x'"),
        ("a.jsonl", "input\n", "a.jsonl, line 1: must be a JSON object"),
        ("a.csv", "input_length,output_length\n1,1e300\n", "line 2: output .* up to 1,000,000,000"),
        (
            "a.jsonl",
            f'{{"input_length": 1, "output_length": 2, "arrival": {"9" * 400}}}\n',
            "line 1: arrival must be a time",
        ),
    ],
)
def test_bad_traces_are_named_by_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_trace(path))
    assert "\n" not in str(caught.value)


def test_unknown_trace_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"azure-code, .*sharegpt, got 'sharedgpt'"):
        list(read_trace("sharedgpt"))


@pytest.mark.parametrize(
    ("date", "hour"), [("12:00:00-03:30", 15.5), ("12:00:00+05:30", 6.5), ("12:00:00Z", 12.0)]
)
def test_time_zones(tmp_path: Path, date: str, hour: float) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 {date},1,2\n")
    (request,) = read_trace(path)
    assert request.arrival is not None and request.arrival % 86400 == 3600 * hour
