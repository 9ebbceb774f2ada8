"""Where the memory of running requests comes from, as the replay asks for it.

A space has `slots` token slots. The loop (loop.py) asks it to admit jobs, to let all rows decode
for some steps, and to take memory back. Implementations: contiguous.py and paged.py; padded.py has
a loop of its own, because its rows leave together. Read next: contiguous.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pykvcache.bench.replay.queue import Job
from pykvcache.bench.replay.rows import Int64Array, Rows

PerStep: TypeAlias = "int | NDArray[np.int64]"
"""One value for all steps, or an array [steps]."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Slots in a run of steps, each after the writes of its step.

    allocated: slots that belong to some row. Of them, `internal` hold no token that is attended and
    never will, and `rounding` were added by the allocator beyond what the policy asked for. What is
    left of `allocated` is live or reserved.
    """

    allocated: PerStep
    internal: PerStep
    rounding: PerStep


class Space(Protocol):
    """Memory under one policy."""

    slots: int

    def holds(self, job: Job) -> bool:
        """Whether the job could be served if the space were empty."""

    def admit(self, job: Job, alone: bool) -> int | None:
        """Take memory for a job; its handle, or None if there is no room now.

        alone: nothing runs, so a space that keeps room for running rows need not.
        """

    def now(self, rows: Rows) -> Usage:
        """Usage of the rows as they are."""

    def decode(self, rows: Rows, limit: int) -> tuple[int, Usage]:
        """Give every row one more slot a step, for as many of `limit` steps as there is room.

        Called before the lengths of `rows` grow. Returns the steps and their usage; with 0 steps a
        row has to leave first.
        """

    def release(self, rows: Rows, index: Int64Array) -> None:
        """Take back the memory of the rows at `index`."""
