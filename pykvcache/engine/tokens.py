"""Tokens of the running requests: `TokenTable`, a table whose rows have different lengths.

Read next: request.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykvcache.batch import Int64Array

SPARE = 64  # tokens that a row may grow by at least
SMALL = 4096  # tokens; a smaller table is not packed anew to save memory


class TokenTable:
    """int32 rows, one after the other in one array; `table[row, :5]` are the first of a row.

    A row that has grown out of its room moves to the end. The array is packed anew when its end is
    reached and when three quarters of it are unused, so its size is in proportion to the rows.

    Args:
        count: rows; all are empty.
    """

    def __init__(self, count: int) -> None:
        self._data = np.empty(0, np.int32)
        self._begin, self._room = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._end = self._used = 0  # of _data; the sum of _room

    @property
    def nbytes(self) -> int:
        """Memory of all rows."""
        return self._data.nbytes

    def __getitem__(self, index: tuple[Any, slice]) -> NDArray[np.int32]:
        """A slice of a row, a view; what has not been written has any value."""
        row, positions = index
        begin = self._begin[row]
        return self._data[begin : begin + self._room[row]][positions]

    def set(self, row: int, tokens: Int64Array) -> None:
        """Make these the tokens of an empty row, which gets room for more."""
        self._grow(row, len(tokens) + 1)
        self[row, : len(tokens)][:] = tokens

    def clear(self, row: int) -> None:
        """The row is empty."""
        self._used -= int(self._room[row])
        self._room[row] = 0
        if len(self._data) > 4 * self._used + SMALL:
            self._pack(0)

    def widen(self, rows: Int64Array, lengths: Int64Array) -> None:
        """Let each row have room for so many tokens."""
        short = lengths > self._room[rows]
        if short.any():
            for row, length in zip(rows[short].tolist(), lengths[short].tolist(), strict=True):
                self._grow(row, length)

    def take(self, rows: Int64Array, positions: Int64Array) -> Int64Array:
        """Token positions[i] of rows[i] for all i."""
        tokens: Int64Array = self._data[self._begin[rows] + positions].astype(np.int64)
        return tokens

    def put(self, rows: Int64Array, positions: Int64Array, tokens: Int64Array) -> None:
        """The reverse of `take`."""
        self._data[self._begin[rows] + positions] = tokens

    def _grow(self, row: int, length: int) -> None:
        room = length + length // 2 + SPARE
        if self._end + room > len(self._data):
            self._pack(room)
        old = self[row, :]
        begin, self._end = self._end, self._end + room
        self._data[begin : begin + len(old)] = old
        self._used += room - len(old)
        self._begin[row], self._room[row] = begin, room

    def _pack(self, more: int) -> None:
        """Copy all rows to a new array, which has room for `more` tokens at its end."""
        data = np.empty(2 * (self._used + more) + SMALL // 4, np.int32)
        end = 0
        for row in np.flatnonzero(self._room).tolist():
            tokens = self[row, :]
            data[end : end + len(tokens)] = tokens
            self._begin[row] = end
            end += len(tokens)
        self._data, self._end = data, end
