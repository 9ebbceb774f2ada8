"""Backends whose tensors live on a GPU where there is one, and on the CPU (emulated) elsewhere."""

from __future__ import annotations

import pytest
import torch

GPU_BACKENDS = ("triton", "cuda")


def skip_if_values_are_not_read(backend: str) -> None:
    """For tests of wrong lengths or ids: on a GPU nobody looks at them, that would wait for it."""
    if backend in GPU_BACKENDS and torch.cuda.is_available():
        pytest.skip("values on a GPU are not checked")
