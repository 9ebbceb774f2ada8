"""Notices that the weights of a model changed, so that nothing computed before is reused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 64  # values of each parameter that are compared


class WeightsWatch:
    """Compares parameters with what they were at the last question.

    Versions catch changes in place and addresses replaced storage. Writes through `.data` leave
    neither trace, so a few values of each parameter are compared as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._marks: list[tuple[int, int]] = []
        self._views: list[Tensor] = []
        self._values: list[Tensor] = []
        self.changed()

    def changed(self) -> bool:
        """Whether anything changed since the last call."""
        parameters = [*self._model.parameters(), *self._model.buffers()]
        marks = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        if marks != self._marks:
            self._marks = marks
            self._views = [_sample(p) for p in parameters]
            self._values = [view.clone() for view in self._views]
            return True
        same = all(
            torch.equal(view, value) for view, value in zip(self._views, self._values, strict=True)
        )
        if not same:
            self._values = [view.clone() for view in self._views]
        return not same


def _sample(parameter: Tensor) -> Tensor:
    """Evenly spaced values of a parameter, as a view of it."""
    flat = parameter.detach()
    if not flat.is_contiguous():
        return flat.flatten()[:0]
    flat = flat.view(-1)
    return flat[:: max(1, len(flat) // SAMPLES)]
