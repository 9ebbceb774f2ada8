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
        for tensor in (*model.parameters(), *model.buffers()):
            try:
                self.marks.append((tensor.data_ptr(), _version(tensor)))
                if tensor.numel() and tensor.is_contiguous() and not tensor.is_meta:
                    some = tensor.detach().view(-1)[:: -(-tensor.numel() // SAMPLED)]
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


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
