"""Finds the best candidate by racing: all are timed in turns, and those that have lost drop out.

Times of a round are compared within the round, so that whatever slows the machine for a while
slows all alike. A launch drops out when it is slower than the best one of its block size by more
than its uncertainty; a block size drops out when its objective is worse than the best by more than
the tolerance and the uncertainty. The race ends when nothing is left to decide, or with the time.

Of block sizes that are equally fast the largest with little waste is recommended: the objective has
what the waste costs already, and larger blocks mean fewer entries, allocations and copies, which it
has not. Which sizes waste little does not depend on times, so that a flat curve and a noisy machine
end in the same block size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MIN_ROUNDS = 15
BOUNDED_ROUNDS = 3
DEFAULT_LAUNCH_MARGIN = 0.01
SIGMAS = 4.0
LITTLE_WASTE = 1.0  # percent


@dataclass(frozen=True, order=True)
class Launch:
    """Launch parameters; 0 = the kernel's own. warps are of GPU kernels only."""

    tile: int = 0
    stages: int = 0
    splits: int = 0
    warps: int = 0

    def entry(self) -> dict[str, int]:
        """The fields of a table entry."""
        values = {"tile": self.tile, "stages": self.stages, "splits": self.splits}
        values["warps"] = self.warps
        return {key: value for key, value in values.items() if value}

    def __str__(self) -> str:
        return " ".join(f"{key} {value}" for key, value in self.entry().items()) or "default"


DEFAULT = Launch()


@dataclass(frozen=True, order=True)
class Candidate:
    block_size: int
    launch: Launch = DEFAULT


@dataclass
class Samples:
    """Seconds of one candidate; index = round."""

    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def against(self, other: Samples) -> tuple[float, float]:
        """Logarithm of this over the other, round by round: median, and its standard error.

        The error comes from the median absolute deviation, which a few disturbed rounds do not
        move.
        """
        count = min(len(self.times), len(other.times))
        pairs = zip(self.times[:count], other.times[:count], strict=True)
        ratios = [math.log(mine / theirs) for mine, theirs in pairs]
        middle = statistics.median(ratios)
        spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
        return middle, 1.2533 * spread / math.sqrt(count)

    def is_slower(self, other: Samples) -> bool:
        """Beyond doubt, by the medians, and also by the quickest quarters of the common rounds."""
        gap, error = self.against(other)
        count = min(len(self.times), len(other.times))
        quick = [sorted(times[:count])[count // 4] for times in (self.times, other.times)]
        return gap - SIGMAS * error > 0 and quick[0] > quick[1]


@dataclass(frozen=True)
class Outcome:
    """The end of a race.

    best: the launch of every block size, also of those that dropped out. times: its seconds.
    block_size: the recommended one. tied: all that count as equally fast, it included.
    settled: nothing was left to decide. rounds: of the candidates that stayed to the end.
    interrupted: by Ctrl-C; the rest is what was known then.
    """

    samples: Mapping[Candidate, Samples]
    best: Mapping[int, Candidate]
    times: Mapping[int, float]
    block_size: int
    tied: tuple[int, ...]
    settled: bool
    rounds: int
    interrupted: bool = False

    @property
    def choice(self) -> Candidate:
        return self.best[self.block_size]


class Race:
    """A race between candidates.

    Args:
        candidates: for each block size at least the default launch.
        sample: times one candidate once, in seconds a unit of work.
        value: objective of (block size, seconds); higher is better.
        waste: of a block size, in percent of the allocated slots.
        tolerance: block sizes whose objective is within this share of the best are tied.
        little_waste: of the tied the largest that wastes at most this is recommended, or if none
            does the one that wastes least.
        exhaustive: nobody drops out.
        bounded: the time counts for more than MIN_ROUNDS; only BOUNDED_ROUNDS are sure.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        sample: Callable[[Candidate], float],
        value: Callable[[int, float], float],
        waste: Callable[[int], float],
        tolerance: float = 0.03,
        little_waste: float = LITTLE_WASTE,
        exhaustive: bool = False,
        bounded: bool = False,
    ) -> None:
        self.samples = {candidate: Samples() for candidate in candidates}
        self.alive = list(self.samples)
        self.rounds = 0
        self._sample, self._value, self._waste = sample, value, waste
        self._tolerance, self._exhaustive = tolerance, exhaustive
        self._little_waste = little_waste
        self._least = BOUNDED_ROUNDS if bounded else MIN_ROUNDS

    def run(
        self,
        seconds: float,
        clock: Callable[[], float],
        advance: Callable[[float], object] = lambda seconds: None,
    ) -> Outcome:
        """Race until it is decided or `seconds` of `clock` are over, but MIN_ROUNDS at least.

        Ctrl-C after those ends the race with what is known; before, it is raised.
        """
        start = last = clock()
        settled = interrupted = False
        decide = MIN_ROUNDS  # the next round to decide after; statistics take time as well
        try:
            while not settled and (self.rounds < self._least or clock() - start < seconds):
                self._play_round()
                if self.rounds >= decide and not self._exhaustive:
                    settled = self._drop_losers()
                    decide = self.rounds + max(1, self.rounds // 5)
                now = clock()
                advance(now - last)
                last = now
        except KeyboardInterrupt:
            if self.rounds < self._least:
                raise
            interrupted = True
        if self._exhaustive:
            settled = self._drop_losers()
        return self._outcome(settled and not interrupted, interrupted)

    def _play_round(self) -> None:
        """One sample of everybody that is left, each round starting with the next one."""
        first = self.rounds % len(self.alive)
        times = {c: self._sample(c) for c in self.alive[first:] + self.alive[:first]}
        for candidate, time in times.items():
            self.samples[candidate].times.append(time)
        self.rounds += 1

    def _of(self, block_size: int) -> list[Candidate]:
        return [c for c in self.alive if c.block_size == block_size]

    def _block_sizes(self) -> list[int]:
        return sorted({c.block_size for c in self.alive})

    def leader(self, candidates: Sequence[Candidate]) -> Candidate:
        """The fastest; the default launch unless another is faster by DEFAULT_LAUNCH_MARGIN."""
        fastest = min(candidates, key=lambda c: self.samples[c].median)
        for candidate in candidates:
            if candidate.launch == DEFAULT:
                gain = self.samples[candidate].against(self.samples[fastest])[0]
                return candidate if gain < DEFAULT_LAUNCH_MARGIN else fastest
        return fastest

    def _drop_losers(self) -> bool:
        """Drop who has lost (nobody in an exhaustive race); whether all else is decided."""
        open_questions = 0
        kept: list[Candidate] = []
        leaders = {size: self.leader(self._of(size)) for size in self._block_sizes()}
        for size, leader in leaders.items():
            for candidate in self._of(size):
                gap, error = self.samples[candidate].against(self.samples[leader])
                lost = self.samples[candidate].is_slower(self.samples[leader])
                lost = lost and candidate.launch != DEFAULT
                if candidate == leader or not lost:
                    kept.append(candidate)
                    slack = gap + SIGMAS * error  # how much faster it might still be
                    open_questions += candidate != leader and gap - SIGMAS * error < -0.02 < slack
        times = self._times(leaders)
        values = {size: self._value(size, times[size]) for size in leaders}
        best = max(values, key=lambda size: values[size])
        line = values[best] * (1 - self._tolerance)
        tied = {size for size in leaders if values[size] >= line}
        for size in leaders:
            low, high = self._bounds(leaders[size], leaders[best], times[best])
            if high < line:
                kept = [c for c in kept if c.block_size != size]
            elif size != best and low < line:
                open_questions += self._choose(tied) != self._choose(tied ^ {size})
        if not self._exhaustive:
            self.alive = kept
        return open_questions == 0

    def _times(self, leaders: Mapping[int, Candidate]) -> dict[int, float]:
        """Seconds of the leaders, by their ratio to one of those that ran in every round.

        So candidates that dropped out early do not carry the disturbances of their few rounds.
        """
        whole = max(leaders.values(), key=lambda c: len(self.samples[c].times))
        anchor = self.samples[whole]
        return {
            size: anchor.median * math.exp(self.samples[leader].against(anchor)[0])
            for size, leader in leaders.items()
        }

    def _bounds(self, leader: Candidate, best: Candidate, time: float) -> tuple[float, float]:
        """The objective if the leader takes as long or as short as it may, the best one `time`."""
        gap, error = self.samples[leader].against(self.samples[best])
        low, high = (
            self._value(leader.block_size, time * math.exp(gap + sign * SIGMAS * error))
            for sign in (1, -1)
        )
        return low, high

    def _outcome(self, settled: bool, interrupted: bool) -> Outcome:
        sizes = sorted({c.block_size for c in self.samples})
        best = {}
        for size in sizes:
            left = self._of(size) or [c for c in self.samples if c.block_size == size]
            most = max(len(self.samples[c].times) for c in left)
            best[size] = self.leader([c for c in left if len(self.samples[c].times) == most])
        alive = [size for size in sizes if self._of(size)]
        times = self._times(best)
        values = {size: self._value(size, times[size]) for size in alive}
        line = max(values.values()) * (1 - self._tolerance)
        tied = tuple(size for size in alive if values[size] >= line)
        chosen = self._choose(tied)
        return Outcome(self.samples, best, times, chosen, tied, settled, self.rounds, interrupted)

    def _choose(self, tied: Collection[int]) -> int:
        """The recommended one of equally fast block sizes."""
        little = [size for size in tied if self._waste(size) <= self._little_waste]
        return max(little, default=min(tied, key=lambda size: (self._waste(size), size)))
