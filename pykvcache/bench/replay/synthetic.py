"""Requests drawn from two distributions that papers name by their means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pykvcache.bench.traces import Request

CHUNK = 4096
DEFAULT_COUNT = 10_000


@dataclass(frozen=True)
class LogNormal:
    """Prompt and output lengths, independent and log-normal, with these means in tokens.

    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
    (SOSP 2023), give the means of ShareGPT and Alpaca requests; the shape of the distribution is an
    assumption, `sigma` being the standard deviation of the logarithm.
    """

    prompt: float
    output: float
    sigma: float = 1.0

    def draw(self, count: int, seed: int) -> Iterator[Request]:
        """`count` requests; a longer run begins with those of a shorter one."""
        generator = np.random.default_rng(seed)
        means = np.log([self.prompt, self.output]) - self.sigma**2 / 2
        for first in range(0, count, CHUNK):
            normal = generator.standard_normal((CHUNK, 2))
            lengths = np.rint(np.exp(means + self.sigma * normal)).astype(int)
            for prompt, output in lengths[: count - first].tolist():
                yield Request(prompt, output)


SYNTHETIC = {"sharegpt-like": LogNormal(161, 338), "alpaca-like": LogNormal(19, 58)}


def check_sigma(sigma: float) -> None:
    """Raises ValueError unless a log-normal distribution can have this sigma."""
    if not (0 <= sigma <= 5 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be 0 to 5, got {sigma}")
