"""The replay of prefixes, against a simulator of least-recently-used blocks."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from pykvcache.bench.prefix import replay
from pykvcache.bench.traces import read_prefix_blocks


def simulate(requests: list[list[int]], num_blocks: int | None) -> int:
    """Hits: touch or insert each block of a request, from the tail to the head."""
    present: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        for block in request:
            if block not in present:
                break
            hits += 1
        for block in reversed(request):
            present[block] = None
            present.move_to_end(block)
        while num_blocks is not None and len(present) > num_blocks:
            present.popitem(last=False)
    return hits


@pytest.mark.parametrize(
    ("num_blocks", "hits", "percent"),
    [(10_000, 61_046, 21.2), (30_000, 93_978, 32.6), (None, 105_710, 36.6)],
)
def test_the_mooncake_trace(num_blocks: int | None, hits: int, percent: float) -> None:
    requests = list(read_prefix_blocks("mooncake-conv"))
    result = replay(requests, num_blocks)
    assert (result.requests, result.references) == (12_031, 288_500)
    assert result.hits == simulate(requests, num_blocks) == hits
    assert round(100 * result.hit_rate, 1) == percent


@pytest.mark.parametrize("num_blocks", [1, 7, 20, 100, None])
def test_random_conversations(num_blocks: int | None) -> None:
    """Also requests that have more blocks than the pool."""
    random = np.random.default_rng(0)
    requests: list[list[int]] = []
    for fresh in range(0, 30_000, 30):
        begin = requests[random.integers(len(requests))] if requests and fresh % 4 else []
        begin = begin[: random.integers(len(begin) + 1)]
        requests.append([*begin, *range(fresh, fresh + random.integers(0, 30))])
    assert max(map(len, requests)) > 20
    assert replay(requests, num_blocks).hits == simulate(requests, num_blocks)


def test_the_command_prints_and_saves(run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"hash_ids": ids} for ids in ([0, 1, 2], [0, 1, 3], [], [0, 1, 2])]
    trace.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--trace", str(trace), "--num-blocks", "3", "--num-blocks", "0", "--json"]
    code, out, err = run("prefix", *arguments, str(tmp_path / "out.json"))
    assert code == 0, err
    assert "4 requests, 9 block references" in out
    saved = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["num_blocks"], row["hits"]) for row in saved] == [(3, 4), (None, 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"input_length": 1}', "line 1: must be a JSON object with hash_ids"),
        ('{"hash_ids": [1]}\n{"hash_ids": ["x"]}', "line 2: must be a JSON object with hash_ids"),
        ("text", "line 1: must be a JSON object"),
        (None, "trace must be a file or one of"),
    ],
)
def test_a_trace_without_blocks_is_refused(
    run, tmp_path: Path, content: str | None, message: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    if content is not None:
        trace.write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_prefix_blocks(trace))
    assert run("prefix", "--trace", str(trace))[0] == 2


def test_ids_of_any_size_are_told_apart() -> None:
    """Unsigned 64-bit hashes, and ids that differ in their high bits only."""
    requests = [[7 + i * 2**31, 2**64 - i] for i in range(20)]
    assert replay(requests).hits == 0
    assert replay(requests + requests).hits == 40
