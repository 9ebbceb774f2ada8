"""The policies, by name, and how each is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pykvcache.bench.replay import contiguous
from pykvcache.bench.replay.loop import Observer, Replay
from pykvcache.bench.replay.padded import PaddedReplay
from pykvcache.bench.replay.paged import Paged
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.space import Space
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Workload

if TYPE_CHECKING:
    from pykvcache.bench.replay.scheduled import ScheduledReplay

CONTIGUOUS: dict[str, Callable[[int, int, bool], contiguous.Contiguous]] = {
    "max-length": contiguous.max_length,
    "power-of-two": contiguous.power_of_two,
    "oracle-first-fit": contiguous.oracle_first_fit,
    "oracle-buddy": contiguous.oracle_buddy,
}
BUDDIES = ("power-of-two", "oracle-buddy")
PADDED, PAGED = "padded", "paged"
POLICIES = (*CONTIGUOUS, PADDED, PAGED)
ALIASES = {"max": "max-length", "pow2": "power-of-two", "oracle": "oracle-buddy"}
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One row of the table: a policy, for paged ones with its block size."""

    policy: str
    block_size: int | None = None

    @property
    def label(self) -> str:
        return self.policy if self.block_size is None else f"{self.policy} {self.block_size}"


def choose_cases(policies: Sequence[str], block_sizes: Sequence[int]) -> list[Case]:
    """Cases in the order of POLICIES; none named means all.

    Raises:
        ValueError: unknown policy, or a block size below 1.
    """
    names = [ALIASES.get(name, name) for name in policies] or list(POLICIES)
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    for size in block_sizes:
        if size < 1:
            raise ValueError(f"block_size must be at least 1, got {size}")
    if len(set(block_sizes)) < len(block_sizes):
        raise ValueError(f"block_size must not be repeated, got {','.join(map(str, block_sizes))}")
    cases = [Case(name) for name in POLICIES if name in names and name != PAGED]
    if PAGED in names:
        cases += [Case(PAGED, size) for size in block_sizes or BLOCK_SIZES]
    return cases


def make_space(case: Case, slots: int, max_len: int, rules: Rules) -> Space:
    """The memory of a case; not for the padded batch, which has a loop of its own."""
    if case.block_size is not None:
        return Paged(slots, case.block_size, rules.head_room)
    return CONTIGUOUS[case.policy](slots, max_len, rules.buddy_rest == "used")


def make_replay(
    case: Case,
    workload: Workload,
    slots: int,
    max_len: int,
    rules: Rules,
    advance: Callable[[int], object] = lambda count: None,
    observe: Observer | None = None,
) -> Replay | ScheduledReplay:
    """What replays a case; not for the padded batch."""
    result = Result(case.policy, case.block_size, slots)
    if case.block_size is not None and rules.scheduler == "engine":
        from pykvcache.bench.replay.scheduled import ScheduledReplay  # loads transformers

        size, result.by_engine = case.block_size, True
        return ScheduledReplay(workload, slots, size, result, rules, advance, observe)
    space = make_space(case, slots, max_len, rules)
    return Replay(workload, space, result, rules, advance, observe)


def run_case(
    case: Case,
    workload: Workload,
    slots: int,
    max_len: int,
    rules: Rules,
    advance: Callable[[int], object] = lambda count: None,
    observe: Observer | None = None,
) -> Result:
    """Replay a workload, none of whose requests is longer than `max_len`, under one policy."""
    if case.policy == PADDED:
        result = Result(case.policy, None, slots)
        return PaddedReplay(workload, slots, result, rules, advance).run()
    return make_replay(case, workload, slots, max_len, rules, advance, observe).run()
