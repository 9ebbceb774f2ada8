"""Notices that the weights of a model have changed, so that cached keys and values are stale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLED = 16  # elements of each parameter that are compared


class Fingerprint:
    """Tells whether the weights of a model are still the same.

    Version counters and addresses show every ordinary change. Writing through `.data` changes
    neither, so some elements of each tensor are compared, too. A model with tensors that have no
    plain memory (sparse ones) counts as changed every time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.marks: list[object] = []
        samples: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in weights(model):
            try:
                self.marks.append(mark(tensor))
                flat = _flat(tensor)
                if flat is not None:
                    some = flat[:: -(-tensor.numel() // SAMPLED)]
                    samples.setdefault((tensor.dtype, tensor.device), []).append(some)
            except (RuntimeError, NotImplementedError):
                self.marks.append(object())  # a tensor without plain memory: never the same
        self.samples = [torch.cat(group).view(torch.uint8) for group in samples.values()]

    def same(self, other: Fingerprint) -> bool:
        """Whether nothing has changed since `other`."""
        return self.marks == other.marks and all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(self.samples, other.samples, strict=True)
        )


def weights(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, but the frequencies that rotary embeddings write in every forward."""
    buffers = [b for name, b in model.named_buffers() if not name.endswith("inv_freq")]
    return [*model.parameters(), *buffers]


def mark(tensor: Tensor) -> tuple[int, int]:
    """Address and version; raises for a tensor without plain memory."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _flat(tensor: Tensor) -> Tensor | None:
    """All elements in the order of memory, as a view; None where there is no such view."""
    if not tensor.numel() or tensor.is_meta:
        return None
    strides = tensor.stride()
    ordered = tensor.detach().permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    return ordered.view(-1) if ordered.is_contiguous() else None
