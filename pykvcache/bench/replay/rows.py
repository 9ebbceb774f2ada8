"""The rows of the running batch, as arrays in order of admission."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64Array: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

LENGTH, FINAL, PROMPT, OUTPUT, HANDLE = range(5)


class Rows:
    """int64 columns of equal length; row 0 was admitted first.

    `length` is the number of cached tokens, `final` what it ends with, and `handle` what the space
    gave out at admission. The views change with every call that adds or drops rows.
    """

    def __init__(self) -> None:
        self._data = np.empty((5, 16), np.int64)
        self.count = 0
        self._view()

    @classmethod
    def of(cls, length: Int64Array, final: Int64Array, handle: Int64Array) -> Rows:
        """Rows to look at, whose prompts and outputs nobody asks for."""
        rows, none = cls(), np.zeros_like(length)
        rows._data, rows.count = np.stack([length, final, none, none, handle]), len(length)
        rows._view()
        return rows

    def _view(self) -> None:
        used = self._data[:, : self.count]
        self.length: Int64Array = used[LENGTH]
        self.final: Int64Array = used[FINAL]
        self.output: Int64Array = used[OUTPUT]
        self.handle: Int64Array = used[HANDLE]

    def add(self, length: int, final: int, prompt: int, output: int, handle: int) -> None:
        """A new last row."""
        if self.count == self._data.shape[1]:
            self._data = np.concatenate([self._data, np.empty_like(self._data)], axis=1)
        self._data[:, self.count] = length, final, prompt, output, handle
        self.count += 1
        self._view()

    def drop(self, gone: BoolArray) -> None:
        """Remove the rows where `gone` is true; the others keep their order."""
        kept = self._data[:, : self.count][:, ~gone]
        self.count = kept.shape[1]
        self._data[:, : self.count] = kept
        self._view()

    def take(self, row: int) -> tuple[int, int, int, int]:
        """Remove one row: (length, final, prompt, output)."""
        length, final, prompt, output, _ = self._data[:, row].tolist()
        self.drop(np.arange(self.count) == row)
        return length, final, prompt, output
