"""What the tests of `pykvcache bench` share: how to run it, also over cases of milliseconds."""

from __future__ import annotations

from functools import partial

import pytest

from pykvcache.bench import cases, peaks, tensors
from pykvcache.bench.cases import Heads

QUICK = ("kernels", "--quick", "--heads", "gqa", "--dtypes", "fp32", "--threads", "1")
QUICK += ("--seconds", "0.01", "--block-sizes", "8,16", "--device", "cpu", "--peers", "none")


@pytest.fixture
def run(run_command):
    """Run `pykvcache bench ...`: (exit code, standard output, standard error)."""
    return partial(run_command, "bench")


@pytest.fixture
def run_kernels(run, monkeypatch: pytest.MonkeyPatch):
    """Run `pykvcache bench kernels ...` over cases that take milliseconds."""
    monkeypatch.setattr(peaks, "READ_BYTES", 2**20)
    monkeypatch.setattr(peaks, "GEMM_SIZE", 64)
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**16)
    monkeypatch.setitem(cases.HEADS, "gqa", Heads("gqa", 4, 2, 16))
    monkeypatch.setattr(cases, "QUICK_DECODE_SIZES", ((1, 64), (1, 128), (2, 128)))
    monkeypatch.setattr(cases, "QUICK_PREFILL_SIZES", ((1, 64),))
    return partial(run, *QUICK)
