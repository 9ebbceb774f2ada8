"""What the scheduler is told and what it says: `Options`, `Step`, `Preemption`.

Read first: request.py. Read next: scheduler.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from pykvcache.batch import Batch, Int64Array
from pykvcache.cache import parse_positive

MAX_RUNNING = 2**16


@dataclass(frozen=True)
class Options:
    """Limits of the scheduler.

    Raises:
        ValueError, TypeError: one is out of range; the message names it.

    Attributes:
        token_budget: most tokens of a step.
        max_running: most requests that have blocks and take part in steps.
        head_room: share of the pool that stays free for running requests when one is admitted.
        patience: arrivals that one unit of priority overtakes.
    """

    token_budget: int = 2048
    max_running: int = 256
    head_room: float = 0.05
    patience: int = 1000

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_running", "patience"):
            object.__setattr__(self, name, parse_positive(name, getattr(self, name)))
        if self.max_running > MAX_RUNNING:
            raise ValueError(f"max_running must be at most {MAX_RUNNING}, got {self.max_running}")
        if isinstance(self.head_room, bool) or not isinstance(self.head_room, Real):
            raise TypeError(f"head_room must be a number, got {self.head_room!r}")
        if not 0 <= self.head_room < 1:
            raise ValueError(f"head_room must be at least 0 and below 1, got {self.head_room}")


@dataclass(frozen=True)
class Preemption:
    """One entry of the log: who lost its blocks, in which step, and what that costs.

    `tokens` had been computed. `method` is "recompute" or "swap". `seconds` is what it costs: to
    compute them again at the rate of the steps so far, or twice what moving the blocks away took.
    """

    order: int
    step: int
    tokens: int
    method: str
    seconds: float


@dataclass
class Step:
    """What the next forward computes; row i is lanes[i].

    Attributes:
        lanes, starts, counts: int64 [B]; row i computes counts[i] tokens from position starts[i].
        wanted: int64 [B], how many of a row's last tokens in this step give wanted logits.
        batch: its metadata arrays: block tables, slots, lengths.
        copies: per layer group int64 [N, 2], blocks to copy before anything is written.
    """

    lanes: Int64Array
    starts: Int64Array
    counts: Int64Array
    wanted: Int64Array
    batch: Batch
    copies: list[Int64Array]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.counts.sum())
