"""Small arrays that go to a device together: one copy a step instead of one an array.

Read next: graphs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; kernels load vectors of so many


class Staging:
    """Arrays on the host, and tensors on a device that get their values by `send`.

    Args:
        layout: shape and dtype of each.
        device: where the tensors are.

    Attributes:
        arrays: numpy arrays to write to, over one buffer; page-locked where the device is a GPU.
        tensors: what `send` writes, at addresses that stay.
    """

    def __init__(
        self, layout: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> None:
        self._ends: list[int] = []
        begins: list[int] = []
        size = 0
        for shape, dtype in layout:
            begins.append(size)
            self._ends.append(size + prod(shape) * dtype.itemsize)
            size = -(-self._ends[-1] // ALIGNMENT) * ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event() if on_gpu else None

        def views(buffer: Tensor) -> list[Tensor]:
            parts = zip(begins, self._ends, layout, strict=True)
            return [buffer[a:b].view(dtype).view(shape) for a, b, (shape, dtype) in parts]

        self.arrays: list[NDArray[Any]] = [view.numpy() for view in views(self._host)]
        self.tensors = views(self._device)

    def wait(self) -> None:
        """Until the last `send` has read the arrays; call it before they are written again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, rows: int) -> None:
        """Start to copy all arrays, but of the last one only so many rows."""
        last = self.arrays[-1]
        end = self._ends[-1] - (len(last) - rows) * last[:1].nbytes
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
