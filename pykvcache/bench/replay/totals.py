"""Sums over time, and the row of the table that they become."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.space import PerStep, Usage

SHARES = ("live", "reserved", "internal", "rounding", "external")
KEYS = (
    *("policy", "block_size", *SHARES, "mean_batch", "peak_batch", "preemptions"),
    *("recomputed_tokens", "prefix_hit", "throughput"),
)
BESIDE = ("waste_per_sequence", "tokens_per_sequence")
UNIT = 2**20


@dataclass
class Window:
    """Integrals over time of slots and rows, in slot-seconds and row-seconds."""

    seconds: float = 0.0
    live: float = 0.0
    allocated: float = 0.0
    internal: float = 0.0
    rounding: float = 0.0
    rows: float = 0.0

    def add(
        self, seconds: float | NDArray[np.floating[Any]], live: PerStep, usage: Usage, rows: PerStep
    ) -> None:
        """Add steps of these durations."""
        total = seconds if isinstance(seconds, float) else float(seconds.sum())
        self.seconds += total

        def integral(values: PerStep) -> float:
            return total * values if isinstance(values, int) else float(np.dot(seconds, values))

        self.live += integral(live)
        self.allocated += integral(usage.allocated)
        self.internal += integral(usage.internal)
        self.rounding += integral(usage.rounding)
        self.rows += integral(rows)

    def __add__(self, other: Window) -> Window:
        return Window(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Seconds:
    """Where the time went: the parts of StepCost, and waiting for requests to arrive."""

    base: float = 0.0
    kv: float = 0.0
    prefill: float = 0.0
    swap: float = 0.0
    idle: float = 0.0

    def add_step(self, cost: StepCost, cached: int, prefill: int) -> float:
        """Count one step; returns its duration."""
        kv, computing = cost.per_kv_token * cached, cost.per_prefill_token * prefill
        self.base += cost.base
        self.kv += kv
        self.prefill += computing
        return cost.base + kv + computing

    @property
    def total(self) -> float:
        return self.base + self.kv + self.prefill + self.swap + self.idle


@dataclass
class Result:
    """What one policy did with a trace.

    Shares are averages over the time in which a request waits (`waiting`; `calm` is the rest in
    which rows run), and of the whole budget. If none ever waits, they are averages over all time,
    of what is allocated: memory that nobody wants is no waste.
    """

    policy: str
    block_size: int | None
    slots: int
    seconds: Seconds = field(default_factory=Seconds)
    waiting: Window = field(default_factory=Window)
    calm: Window = field(default_factory=Window)
    requests: int = 0
    refused: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    peak_batch: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    by_engine: bool = False  # paged by the engine's scheduler

    @property
    def label(self) -> str:
        """The policy, with its block size."""
        return self.policy if self.block_size is None else f"{self.policy} {self.block_size}"

    @property
    def window(self) -> Window:
        """What the shares are averages over."""
        return self.waiting if self.waiting.seconds else self.calm

    def shares(self) -> dict[str, float]:
        """The five shares in percent; multiples of 2**-20, so that they sum to exactly 100."""
        window = self.window
        slots = self.slots * window.seconds if self.waiting.seconds else window.allocated
        parts = {
            "reserved": window.allocated - window.live - window.internal - window.rounding,
            "internal": window.internal,
            "rounding": window.rounding,
            "external": slots - window.allocated,
        }
        units = {k: max(0, round(100 * UNIT * v / slots)) if slots else 0 for k, v in parts.items()}
        return {"live": 100 - sum(units.values()) / UNIT} | {k: v / UNIT for k, v in units.items()}

    def printed_shares(self) -> dict[str, str]:
        """The shares with one decimal that sum to 100.0 as they are printed.

        `live` is rounded; of the others those with the largest remainders are rounded up.
        """
        tenths = {name: 10 * share for name, share in self.shares().items()}
        printed = {name: math.floor(share) for name, share in tenths.items()}
        printed["live"] = math.floor(tenths["live"] + 0.5)
        others = sorted(SHARES[1:], key=lambda name: printed[name] - tenths[name])
        for name in others[: 1000 - sum(printed.values())]:
            printed[name] += 1
        return {name: f"{count / 10:.1f}" for name, count in printed.items()}

    @property
    def mean_batch(self) -> float:
        """Rows that generate, averaged over the same time as the shares."""
        return self.window.rows / self.window.seconds if self.window.seconds else 0.0

    @property
    def waste_per_sequence(self) -> float:
        """Slots that a row has and that hold no live token, averaged over rows and time."""
        window = self.window
        return (window.allocated - window.live) / window.rows if window.rows else 0.0

    @property
    def tokens_per_sequence(self) -> float:
        """Live tokens of a row, averaged over rows and time."""
        return self.window.live / self.window.rows if self.window.rows else 0.0

    @property
    def waste_of_allocated(self) -> float:
        """Share of the allocated slots that hold no live token, in percent."""
        window = self.window
        return 100 * (1 - window.live / window.allocated) if window.allocated else 0.0

    @property
    def throughput(self) -> float:
        """Generated tokens a second, from the first arrival to the last token."""
        return self.output_tokens / self.seconds.total if self.seconds.total else 0.0

    @property
    def prefix_hit(self) -> float:
        """Prompt tokens that were found in the cache, in percent."""
        return 100 * self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """The row: KEYS, then BESIDE, and `shares_of` where shares are not of the budget."""
        keys = (*KEYS, *BESIDE)
        found = self.shares() | {key: getattr(self, key) for key in keys if key not in SHARES}
        row = {key: found[key] for key in keys}
        return row if self.waiting.seconds else row | {"shares_of": "allocated"}
