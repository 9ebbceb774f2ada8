"""What the launchers share: checks of strides, stored dtypes, scales.

Read next: attention.py, cache.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pykvcache import checks

# As kernels/attention/tiles.py and kernels/common/numeric.py name them.
SCALE_KINDS = {"scalar": 1, "head": 1, "slot": 2, "channel": 3}
PLAIN, E4M3_BYTES, E4M3_BYTES_TF32, E4M3_NATIVE = 0, 1, 2, 3
SMALLEST_TF32, SMALLEST_NATIVE_E4M3 = 80, 89


def check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}"
            )


def evenly_strided(x: Tensor) -> Tensor:
    """x [T, heads, D] with strides that are multiples of 16 for every T, or the same ones.

    Triton compiles a kernel of its own for such multiples; strides of transposed views are T * D,
    and anything where T is 1.
    """
    _, heads, dim = x.shape
    if dim % 16 == 0:
        return x
    return x.contiguous().as_strided(x.shape, (heads * dim, dim, 1))


def stored(cache: Tensor) -> Tensor:
    """A float8 cache as bytes, which is how kernels read it."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def storage_kind(cache: Tensor, arch: str) -> int:
    """How a kernel reads the numbers of a cache: see kernels/common/numeric.py."""
    if cache.dtype != torch.float8_e4m3fn:
        return PLAIN
    capability = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    if capability >= SMALLEST_NATIVE_E4M3:
        return E4M3_NATIVE
    return E4M3_BYTES_TF32 if capability >= SMALLEST_TF32 else E4M3_BYTES


def scale_arguments(scale: Tensor | None, cache: Tensor) -> tuple[int, tuple[Any, ...]]:
    """(kind, (scale, stride of blocks, stride of heads)); a scalar is a head's with stride 0."""
    if scale is None:
        return 0, (None, 0, 0)
    kind = SCALE_KINDS[checks.scale_kind(scale, cache.shape[2], cache.shape[3])]
    if scale.dim() == 3:
        return kind, (scale, scale.stride(0), scale.stride(1))
    return kind, (scale, 0, scale.stride(0) if scale.dim() else 0)


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be checked: on a GPU that would wait for it."""
    return tensor.device.type == "cpu"
