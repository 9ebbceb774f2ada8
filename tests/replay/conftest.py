"""What the tests of `pykvcache replay` share: how to run it; they can import replay_model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def run(run_command):
    """Run `pykvcache replay ...`: (exit code, standard output, standard error)."""
    return partial(run_command, "replay")


@pytest.fixture
def run_small(run):
    """Run `pykvcache replay ...` over 120 requests."""
    return partial(run, "--requests", "120")
