"""`pykvcache bench allocator`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench import allocator as allocator_code


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
