"""Notices that the weights of a model have changed, so that cached keys and values are stale.

`Weights` is the list of what a model computes with; `Fingerprint` is what it looked like.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLED = 128  # elements of each parameter that are compared, or a few more

Sample = tuple[tuple[int], tuple[int], int]  # size, stride, offset

_version = operator.attrgetter("_version")
_training = operator.attrgetter("training")


class Weights:
    """Parameters, buffers, rotary frequencies and adapter switches of a model, found once.

    Forwards write frequencies (buffers named *inv_freq) or put others in their place, so they are
    looked up by name and compared by all their values.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())  # kept: the ids of what is gone could come again
        self._dicts: list[dict[str, Any]] = []
        self._frequencies: list[tuple[dict[str, Any], str]] = []
        for module in self._modules:
            self._dicts += [module._modules, module._parameters]
            names = [name for name in module._buffers if _is_frequency(name)]
            self._frequencies += [(module._buffers, name) for name in names]
            if not names:
                self._dicts.append(module._buffers)
        self._adapters = [module for module in self._modules if hasattr(module, "_active_adapter")]
        self._ids = self._present()
        buffers = [b for name, b in model.named_buffers() if not _is_frequency(name)]
        self._tensors = [*model.parameters(), *buffers]
        groups: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Sample]]] = {}
        for tensor in self._tensors:
            sample = _sample(tensor)
            if sample is not None:
                groups.setdefault((tensor.dtype, tensor.device), []).append((tensor, sample))
        self._groups = list(groups.values())
        self._untracked = [tensor.is_inference() for tensor in self._tensors]

    def is_complete(self) -> bool:
        """Whether the model still has the same modules, parameters and buffers."""
        return self._present() == self._ids

    def marks(self) -> list[object]:
        """Addresses and versions; never equal to others if a tensor has no plain memory.

        With the switches of adapters (those of peft), and which modules are in training mode.
        """
        try:
            addresses = list(map(Tensor.data_ptr, self._tensors))
            if any(self._untracked):
                pairs = zip(self._tensors, self._untracked, strict=True)
                versions = [-1 if untracked else _version(tensor) for tensor, untracked in pairs]
            else:
                versions = list(map(_version, self._tensors))
        except (RuntimeError, NotImplementedError):
            return [object()]
        switches = [_switches(adapter) for adapter in self._adapters]
        return [addresses, versions, switches, list(map(_training, self._modules))]

    def samples(self) -> list[Tensor]:
        """Some elements of every tensor and all frequencies as bytes, by dtype and device."""
        with torch.no_grad():
            found = [
                torch.cat([tensor.as_strided(*sample) for tensor, sample in group])
                for group in self._groups
            ]
            frequencies = [buffers.get(name) for buffers, name in self._frequencies]
            found += [f.detach().flatten().clone() for f in frequencies if f is not None]
            return [sample.view(torch.uint8) for sample in found]

    def _present(self) -> list[int]:
        values = itertools.chain.from_iterable(map(dict.values, self._dicts))
        return list(map(id, values))


class Fingerprint:
    """Tells whether the weights of a model are still the same.

    Version counters and addresses show every ordinary change. Writing through `.data` changes
    neither, so some elements of each tensor are compared, too: at least one of every 2 % of its
    rows, and of its columns, and the last. A model with tensors that have no plain memory (sparse
    ones) counts as changed every time.
    """

    def __init__(self, model: nn.Module | Weights) -> None:
        weights = model if isinstance(model, Weights) else Weights(model)
        self.marks, self.samples = weights.marks(), weights.samples()

    def same(self, other: Fingerprint) -> bool:
        """Whether nothing has changed since `other`."""
        return self.marks == other.marks and same_samples(self.samples, other.samples)


def same_samples(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists from `Weights.samples` agree bit by bit."""
    return len(some) == len(others) and all(
        mine.device == theirs.device and torch.equal(mine, theirs)
        for mine, theirs in zip(some, others, strict=True)
    )


def _is_frequency(name: str) -> bool:
    return name.endswith("inv_freq")


def _sample(tensor: Tensor) -> Sample | None:
    """Size, stride and offset of the view to compare; None where memory is not plain."""
    try:
        if not tensor.numel() or tensor.is_meta:
            return None
        strides = tensor.stride()
        ordered = tensor.detach().permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
        if not ordered.is_contiguous():
            return None
    except (RuntimeError, NotImplementedError):
        return None
    step = _even_step(tuple(ordered.shape))
    last = tensor.numel() - 1
    count = last // step + 1
    return (count,), (step,), int(tensor.storage_offset()) + last - (count - 1) * step


@functools.cache
def _even_step(shape: tuple[int, ...]) -> int:
    """A step through a contiguous tensor, after which samples lie evenly in each of its dims.

    A step that divides a row would see a few columns only. Of some steps that take SAMPLED elements
    or a few more, the one whose largest gap, as a share of a dim, is the smallest.
    """
    most = max((int(np.prod(shape)) - 1) // (SAMPLED - 1), 1)
    steps = {max(most - i * (most // 1024 + 1), 1) for i in range(SAMPLED)}
    places = np.arange(SAMPLED, dtype=np.int64)
    lengths = np.cumprod(shape[:0:-1])

    def largest_gap(step: int) -> float:
        gap = 0.0
        for length in lengths:
            found = np.sort(places * step % length)
            gap = max(gap, np.diff(found, append=found[0] + length).max() / length)
        return gap

    return min(sorted(steps, reverse=True), key=largest_gap)


def _switches(adapter: Any) -> list[str]:
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return [str(getattr(adapter, name, None)) for name in names]
