"""The different tokens of a growing text, which is all that a repetition penalty looks at.

Read next: sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pykvcache.batch import Int64Array


class Distinct:
    """Tokens of a prompt, and those of an output as it grows.

    Args:
        prompt: the different tokens of the prompt, at least one; shared by its samples.
        output: what has been generated.
    """

    def __init__(self, prompt: Int64Array, output: Int64Array) -> None:
        self.prompt = prompt
        self._output = np.unique(output)
        self._count = len(self._output)
        self._seen = set(self._output.tolist())

    @property
    def output(self) -> Int64Array:
        """The different tokens of the output."""
        return self._output[: self._count]

    def add(self, token: int) -> None:
        """The output has grown."""
        if token in self._seen:
            return
        if self._count == len(self._output):
            self._output = np.concatenate([self._output, np.empty(self._count + 16, np.int64)])
        self._output[self._count] = token
        self._count += 1
        self._seen.add(token)


def stacked(texts: Sequence[Distinct]) -> Int64Array:
    """Row i holds the tokens of texts[i], the last ones repeated: int64 [len(texts), width]."""
    lengths = [(len(text.prompt), len(text.output)) for text in texts]
    rows = np.empty((len(texts), max(map(sum, lengths))), np.int64)
    for row, text, (prompt, output) in zip(rows, texts, lengths, strict=True):
        row[:prompt] = text.prompt
        row[prompt : prompt + output] = text.output
        row[prompt + output :] = text.prompt[-1]
    return rows
