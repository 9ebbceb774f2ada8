"""The operators of backend "triton".

Read next: attention.py, cache.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pykvcache.kernels.launch.attention import merge_states, paged_attention, plan
from pykvcache.kernels.launch.cache import copy_blocks, gather_kv, slot_mapping, write_kv
from pykvcache.kernels.launch.table import INTERPRETED

_libraries: list[torch.library.Library] = []


def on_device_of_tensors(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with the device of its first argument as the current one.

    Triton launches on the current device's current stream, wherever the tensors are.
    """

    @functools.wraps(operator)
    def call(first: Any, *others: Any) -> Any:
        tensors = [first] if isinstance(first, torch.Tensor) else first
        devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
        if len(devices) != 1 or devices == {torch.cuda.current_device()}:
            return operator(first, *others)
        with torch.cuda.device(devices.pop()):
            return operator(first, *others)

    return call


def register() -> None:
    """Make these the operators of namespace pykvcache_triton."""
    if _libraries:
        return
    library = torch.library.Library("pykvcache_triton", "IMPL")
    _libraries.append(library)
    operators = (
        write_kv, paged_attention, merge_states, copy_blocks, gather_kv, slot_mapping, plan,
    )  # fmt: skip
    for operator in operators:
        library.impl(operator.__name__, on_device_of_tensors(operator), "CUDA")
        if INTERPRETED:
            library.impl(operator.__name__, operator, "CPU")
