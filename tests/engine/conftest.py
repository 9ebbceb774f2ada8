"""Engines over the tiny models of tests/hf."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))


@pytest.fixture(autouse=True, scope="session")
def _quiet_single_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
