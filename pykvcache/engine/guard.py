"""Watches the weights of a model for the engine: what was computed with others is never shared."""

from __future__ import annotations

from torch import nn

from pykvcache.weights import Fingerprint, mark, weights


class WeightsGuard:
    """Two looks at the weights: a thorough one for new requests, a quick one for every step.

    The quick one compares addresses and versions of the tensors that the thorough one found, which
    shows every change but writes through `.data`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = Fingerprint(model)
        self._tensors = weights(model)

    def changed(self) -> bool:
        """Whether anything changed since the last time that this was asked."""
        now = Fingerprint(self._model)
        same = now.same(self._seen)
        self._seen, self._tensors = now, weights(self._model)
        return not same

    def moved(self) -> bool:
        """Whether an address or a version is another one than `changed` last saw."""
        try:
            return [mark(tensor) for tensor in self._tensors] != self._seen.marks
        except (RuntimeError, NotImplementedError):
            return True
