"""What is common to all policies of a replay: time, order, and who has to leave."""

from __future__ import annotations

from dataclasses import dataclass, field

from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.synthetic import SYNTHETIC

VICTIMS = ("newest", "cheapest")
PREEMPTIONS = ("recompute", "swap")
ORDERS = ("fcfs", "shortest")
BUDDY_RESTS = ("used", "lost")
SCHEDULERS = ("prefill-first", "engine")


@dataclass(frozen=True)
class Rules:
    """What is common to all policies of a replay.

    Attributes:
        cost: seconds of a step.
        saturated: all requests wait from the start; otherwise they arrive as the trace says.
        head_room: share of the blocks that an admission leaves free for running rows (paged).
        victim: whom to preempt: "newest", or "cheapest", the row with the fewest cached tokens.
        preemption: "recompute" what a preempted row had cached, or "swap" it out and in.
        order: "fcfs", first come first served, or "shortest", see Queue.
        buddy_rest: what buddies do with a rest of the memory in which a request of max-len has no
            place: "used" for shorter ones, or "lost", as it is for slots of max-len. See
            default_buddy_rest.
        scheduler: "prefill-first" is loop.py for every policy; "engine" runs the paged ones with
            the engine's scheduler, which chooses victims itself.
        token_budget, max_running, prefix_cache: of the engine's scheduler.
    """

    cost: StepCost = field(default_factory=StepCost)
    saturated: bool = True
    head_room: float = 0.05
    victim: str = "newest"
    preemption: str = "recompute"
    order: str = "fcfs"
    buddy_rest: str = "used"
    scheduler: str = "prefill-first"
    token_budget: int = 2048
    max_running: int = 256
    prefix_cache: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.head_room < 1:
            raise ValueError(f"head_room must be at least 0 and below 1, got {self.head_room}")
        for name, known in (
            ("victim", VICTIMS),
            ("preemption", PREEMPTIONS),
            ("order", ORDERS),
            ("buddy_rest", BUDDY_RESTS),
            ("scheduler", SCHEDULERS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("token_budget", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def default_buddy_rest(trace: str, max_len: int | None) -> str:
    """ "used"; "lost" in the setting of the published figure, which counts that rest as lost.

    The setting is a synthetic trace with a maximum length that was named. See paper.py.
    """
    return "lost" if trace in SYNTHETIC and max_len is not None else "used"
