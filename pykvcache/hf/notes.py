"""Which tokens the rows of a cache hold, kept until the prefix index is told.

Read next: pykvcache/hf/prefixes.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pykvcache.allocator import BlockAllocator
from pykvcache.batch import Int64Array

MOST_STEPS = 32  # noted before they are read: on a GPU that waits for all work


class Notes:
    """Tokens of the forwards of one cache that have ended.

    Attributes:
        end: padded position up to which all tokens are known; -1 = what follows cannot be recorded,
            because something else than its tokens decides about its keys and values.
    """

    def __init__(self) -> None:
        self.end = 0
        self._steps: list[tuple[Tensor, Tensor | None]] = []  # ids, position_ids [B, T]
        self._begin = 0  # of the first step

    def add(self, ids: Tensor, positions: Tensor | None, seen: int) -> bool:
        """Note tokens [B, T] at the end of `seen` positions; True if record() is due."""
        tokens = ids.shape[1]
        if self.end != seen - tokens:
            self.stop()
            return False
        if not self._steps:
            self._begin = self.end
        self._steps.append((ids, positions))
        self.end = seen
        return tokens > 1 or len(self._steps) >= MOST_STEPS

    def stop(self) -> None:
        """Nothing from here on can be recorded."""
        self.end = -1

    def record(self, allocator: BlockAllocator, seqs: Int64Array, pads: list[int] | None) -> None:
        """Tell the allocator, for rows `seqs` with so much padding on the left."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        ids = torch.cat([step for step, _ in steps], 1).cpu().numpy()
        first = np.asarray(pads or [0] * len(ids)) - self._begin  # real columns begin here
        if not _are_usual(steps, ids.shape, first):
            self.stop()
            return
        rows = [row[max(start, 0) :] for row, start in zip(ids, first.tolist(), strict=True)]
        allocator.record(seqs, np.concatenate(rows), [len(row) for row in rows])


def _are_usual(
    steps: list[tuple[Tensor, Tensor | None]], shape: tuple[int, ...], first: Int64Array
) -> bool:
    """Whether the positions of all real tokens count from the first one of their row."""
    if any(positions is None for _, positions in steps):
        return all(positions is None for _, positions in steps)
    given = [positions.expand(shape[0], -1) for _, positions in steps if positions is not None]
    usual = np.arange(shape[1]) - first[:, None]
    return bool(((torch.cat(given, 1).cpu().numpy() == usual) | (usual < 0)).all())
