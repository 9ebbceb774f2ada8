"""The table of running requests' tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pykvcache.engine.request import Lanes, Request
from pykvcache.engine.tokens import SMALL, TokenTable


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_tokens_whatever_happens_to_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, rows = TokenTable(12), {}
    for _ in range(1500):
        row = int(rng.integers(12))
        if row not in rows:
            tokens = rng.integers(0, 2**31, int(10 ** rng.uniform(0, 4)))
            table.set(row, tokens)
            rows[row] = tokens
        elif rng.random() < 0.2:
            table.clear(row)
            del rows[row]
        elif rows:
            some = np.array([r for r in rows if rng.random() < 0.7], np.int64)
            known = np.array([len(rows[r]) for r in some], np.int64)
            new = rng.integers(0, 2**31, len(some))
            table.widen(some, known + 1)
            table.put(some, known, new)
            for r, token in zip(some.tolist(), new.tolist(), strict=True):
                rows[r] = np.append(rows[r], token)
            assert np.array_equal(table.take(some, known), new)
        for r, tokens in rows.items():
            assert np.array_equal(table[r, : len(tokens)], tokens)
        used = sum(len(tokens) + 1 for tokens in rows.values())
        assert table.nbytes <= 4 * (6 * (used + 12 * 96) + 2 * SMALL)


def test_the_table_is_as_large_as_the_texts_that_run() -> None:
    """One long text costs no more with 2,048 lanes, and nothing when it has ended."""
    lanes = Lanes(2048)
    for length in (3000, 7000, 15_000, 31_000):
        request = Request(np.zeros(length, np.int64), length + 5, 0, 0, seq=1)
        lanes.place(request)
        lanes.append(np.array([request.lane]), np.array([7]))
        assert lanes.tokens.nbytes < 4 * 4 * length + 4 * SMALL
        lanes.remove(request.lane)
        assert lanes.tokens.nbytes <= 4 * SMALL
        assert request.length == length + 1 and request.output.tolist() == [7]


def test_a_request_keeps_its_output_and_shares_its_prompt() -> None:
    prompt = np.arange(5)
    request = Request(prompt, 10, 0, 0)
    assert request.tokens is prompt
    text = np.append(request.tokens, [8, 9])
    request.tokens = text
    assert (request.length, request.tokens.tolist()) == (7, [0, 1, 2, 3, 4, 8, 9])
    assert request.prompt is prompt and not np.shares_memory(request.output, text)
