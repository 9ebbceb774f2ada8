"""The table of a replay, and what it means in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pykvcache.bench.replay.cases import PAGED
from pykvcache.bench.replay.totals import SHARES, Result

HARDLY, CLEARLY = 1.2, 2.0
PARTS = {
    "base": "the fixed cost of a step, which more rows share",
    "kv": "reading cached tokens, which costs every row the same however many there are",
    "prefill": "computing prompts, which costs the same however many rows there are",
    "swap": "moving preempted rows to host memory and back",
    "idle": "waiting for requests to arrive",
}


def replay_table(results: Sequence[Result]) -> Table:
    """A line a policy; shares in percent of the budget."""
    table = Table(box=None, pad_edge=False)
    table.add_column("% of the budget", no_wrap=True)
    columns = ("batch", "peak", "preempt", "recomp.", "hits %", "tokens/s", "x")
    for column in (*SHARES, *columns):
        table.add_column(column, justify="right")
    first = results[0].throughput if results else 0.0
    for result in results:
        shares = result.shares()
        table.add_row(
            result.label,
            *(f"{shares[name]:.1f}" for name in SHARES),
            f"{result.mean_batch:.1f}",
            str(result.peak_batch),
            f"{result.preemptions:,}",
            f"{result.recomputed_tokens:,}",
            f"{result.prefix_hit:.1f}",
            f"{result.throughput:,.0f}",
            f"{result.throughput / first:.2f}" if first else "",
        )
    return table


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the table has to know beside it."""
    found = []
    for result in results:
        if result.refused:
            found.append(
                f"{result.label} refused {result.refused:,} requests that it could not "
                "hold even alone"
            )
    idle = [r for r in results if not r.waiting.seconds]
    if idle:
        names = "no request ever waited" if len(idle) == len(results) else "where none waited"
        found.append(f"{names}: shares are of the memory in use, for there was enough of it")
    return found


def regime(results: Sequence[Result]) -> str | None:
    """Whether better packing raises throughput here, by how much, and why.

    Compares the policy that packs worst with blocks of 16, or with the paged row that packs best.
    """
    paged = [r for r in results if r.policy == PAGED]
    others = [r for r in results if r.policy != PAGED]
    if not paged or not others:
        return None
    packed = next((r for r in paged if r.block_size == 16), max(paged, key=live))
    loose = others[0] if others[0].policy == "max-length" else min(others, key=live)
    gain = packed.throughput / loose.throughput if loose.throughput else 1.0
    verb = (
        "lowers" if gain < 0.995 else "hardly raises" if gain < HARDLY else
        "raises" if gain < CLEARLY else "greatly raises"
    )  # fmt: skip
    subject = f"Better packing {verb}" if live(packed) > live(loose) else f"Paging {verb}"
    name, share = largest_part(packed if gain < HARDLY else loose)
    whose = packed if gain < HARDLY else loose
    return (
        f"{subject} throughput here: {loose.policy} -> {PAGED} {packed.block_size} is "
        f"{live(loose):.0f} % -> {live(packed):.0f} % live, a mean batch of "
        f"{loose.mean_batch:.1f} -> {packed.mean_batch:.1f}, {gain:.2f}x the tokens a second. "
        f"{share:.0f} % of the time of {whose.policy} goes to {PARTS[name]}."
    )


def live(result: Result) -> float:
    return result.shares()["live"]


def largest_part(result: Result) -> tuple[str, float]:
    """The part of StepCost that takes most of the time, and its share in percent."""
    parts = {name: getattr(result.seconds, name) for name in PARTS}
    name = max(parts, key=parts.__getitem__)
    return name, 100 * parts[name] / (result.seconds.total or 1.0)
