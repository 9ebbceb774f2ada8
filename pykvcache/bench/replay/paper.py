"""The figure that made paging known, replayed: Kwon et al., SOSP 2023, figure 2.

OPT-13B with 12 GiB for the cache, at most 2,048 tokens a request, ShareGPT lengths. The paper gives
the means of the lengths (section 6.1); their distribution is assumed log-normal, so several shapes
are replayed, and the short requests of Alpaca beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from pykvcache.bench.replay.cases import Case, run_case
from pykvcache.bench.replay.columns import tables
from pykvcache.bench.replay.plan import Budget
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Workload

MEMORY, MODEL, MAX_LEN = "12GiB", "opt-13b", 2048
PUBLISHED = {
    Case("max-length"): 20.4,
    Case("power-of-two"): 26.8,
    Case("oracle-buddy"): 38.2,
    Case("paged", 16): 96.3,
}
SIGMAS = (1.0, 0.8, 0.9, 1.2, 1.4)


@dataclass(frozen=True)
class Regime:
    """A distribution of lengths, and a result for each case of PUBLISHED."""

    label: str
    results: Sequence[Result]


def replay_regimes(
    requests: int, seed: int, rules: Rules, advance: Callable[[int], object] = lambda count: None
) -> list[Regime]:
    """The assumed lengths first, then other shapes of them, then Alpaca's."""
    slots = Budget.of(MEMORY, MODEL, None).slots
    shapes = [("sharegpt-like", sigma) for sigma in SIGMAS] + [("alpaca-like", 1.0)]
    regimes = []
    for trace, sigma in shapes:
        workload = Workload(trace, MAX_LEN, requests, seed, sigma)
        results = [run_case(c, workload, slots, MAX_LEN, rules, advance) for c in PUBLISHED]
        label = f"sigma {sigma}" if trace == "sharegpt-like" else "Alpaca"
        regimes.append(Regime(label, results))
    return regimes


def paper_tables(regimes: Sequence[Regime], width: int) -> list[Table]:
    """Useful share of the cache in percent, and the waste of what is allocated."""
    labels = [
        *(case.label for case in PUBLISHED),
        "waste of allocated blocks, paged 16",
        "slots wasted a sequence, paged 16",
        "mean batch, paged 16",
    ]
    columns = [("published", [*map(str, PUBLISHED.values()), "< 4", "", ""])]
    for regime in regimes:
        shares = [f"{result.shares()['live']:.1f}" for result in regime.results]
        paged = regime.results[-1]
        waste = f"{paged.waste_of_allocated:.1f}", f"{paged.waste_per_sequence:.2f}"
        columns.append((regime.label, [*shares, *waste, f"{paged.mean_batch:.1f}"]))
    return tables(labels, [("", columns)], width, "useful (live) share of the cache, %")
