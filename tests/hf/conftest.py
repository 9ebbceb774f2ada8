"""Quiet transformers, one thread, tests that can import each other's helpers, a fresh model."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from families import make_model

BACKEND = os.environ.get("PYKVCACHE_TEST_BACKEND", "auto")


@pytest.fixture(autouse=True, scope="session")
def _quiet_single_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


@pytest.fixture
def backend() -> str:
    """Backend under test: PYKVCACHE_TEST_BACKEND, or the best one."""
    return BACKEND


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    """A fresh tiny Llama."""
    return copy.deepcopy(make_model("llama"))
