"""Watches the weights of a model for the engine: what was computed with others is never shared."""

from __future__ import annotations

from torch import nn

from pykvcache.weights import Fingerprint, Weights, same_samples


class WeightsGuard:
    """Compares the weights with those that were accepted last.

    A quick look, for every step, sees other tensors, addresses, versions and adapters. A thorough
    one, for new requests and before blocks are shared, also compares values, which shows writes
    through `.data`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._weights = model, Weights(model)
        self._seen = Fingerprint(self._weights)

    def changed(self, thorough: bool) -> bool:
        """Whether the weights are others; they stay others until they are accepted."""
        if not self._weights.is_complete():
            weights = Weights(self._model)
            if not Fingerprint(weights).same(self._seen):
                return True
            self._weights = weights
            return False
        if self._weights.marks() != self._seen.marks:
            return True
        return thorough and not same_samples(self._weights.samples(), self._seen.samples)

    def accept(self) -> None:
        """From now on these are the weights; what others have computed must be forgotten before."""
        weights = Weights(self._model)
        self._seen, self._weights = Fingerprint(weights), weights
