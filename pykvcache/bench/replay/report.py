"""The table of a replay, and what it means in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pykvcache.bench.replay.cases import PAGED
from pykvcache.bench.replay.columns import tables
from pykvcache.bench.replay.plan import counted
from pykvcache.bench.replay.totals import SHARES, Result

HARDLY, CLEARLY = 1.2, 2.0
STAR = " *"
PARTS = {
    "base": "the fixed cost of a step, which more rows share",
    "kv": "reading cached tokens, which costs every row the same however many there are",
    "prefill": "computing prompts, which costs the same however many rows there are",
    "swap": "moving preempted rows to host memory and back",
    "idle": "waiting for requests to arrive",
}


def replay_tables(results: Sequence[Result], width: int) -> list[Table]:
    """A line a policy, shares in percent; two tables or more in a narrow terminal.

    A table of the waste of a sequence follows where there are paged rows.
    """
    shares = [result.printed_shares() for result in results]
    first = results[0].throughput
    columns = [
        ("batch", [f"{r.mean_batch:.1f}" for r in results]),
        ("peak", [str(r.peak_batch) for r in results]),
        ("preempt", [f"{r.preemptions:,}" for r in results]),
        ("recomp.", [f"{r.recomputed_tokens:,}" for r in results]),
        ("hits %", [f"{r.prefix_hit:.1f}" for r in results]),
        ("tokens/s", [f"{r.throughput:,.0f}" for r in results]),
        ("x", [f"{r.throughput / first:.2f}" if first else "" for r in results]),
    ]
    parts = [(name, [share[name] for share in shares]) for name in SHARES]
    heading = "% of the budget" if any(r.waiting.seconds for r in results) else "% of allocated"
    found = tables(labels_of(results), [(heading, parts), ("", columns)], width)
    return [*found, *waste_tables([r for r in results if r.policy == PAGED], width)]


def labels_of(results: Sequence[Result]) -> list[str]:
    """Labels, with a star on rows whose shares are of something else than those of other rows."""
    calm = [not result.waiting.seconds for result in results]
    is_mixed = any(calm) and not all(calm)
    return [r.label + STAR * (c and is_mixed) for r, c in zip(results, calm, strict=True)]


def waste_tables(results: Sequence[Result], width: int) -> list[Table]:
    """What sequences hold and waste, beside the closed form for the end of a last block."""
    if not results:
        return []
    columns = [
        ("measured", [f"{r.waste_per_sequence:.1f}" for r in results]),
        ("(block - 1) / 2", [f"{((r.block_size or 1) - 1) / 2:.1f}" for r in results]),
        ("live", [f"{r.tokens_per_sequence:,.0f}" for r in results]),
    ]
    return tables(labels_of(results), [("slots wasted a sequence", columns)], width)


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the table has to know beside it."""
    found = []
    for result in results:
        if result.refused:
            found.append(
                f"{result.label} refused {counted(result.refused, 'request')} that it could not "
                "hold even alone"
            )
    idle = [r for r in results if not r.waiting.seconds]
    if idle:
        some = "waited for " + ", ".join(result.label for result in idle)
        what, whose = ("ever waited", "") if len(idle) == len(results) else (some, "*")
        their = "its" if len(idle) == 1 else "their"
        found.append(
            f"{whose}{' ' * bool(whose)}no request {what}: {their} shares are of the memory in "
            "use, there was enough of it"
        )
    return found


def regime(results: Sequence[Result]) -> str | None:
    """Whether better packing raises throughput here, by how much, and why.

    Compares the policy that packs worst with blocks of 16, or with the paged row that packs best;
    rows that refused other numbers of requests did other work and are left out.
    """
    paged = [r for r in results if r.policy == PAGED]
    others = [r for r in results if r.policy != PAGED]
    if not paged or not others:
        return None
    packed = next((r for r in paged if r.block_size == 16), max(paged, key=live))
    alike = [r for r in others if r.refused == packed.refused]
    if not alike:
        return (
            f"No policy refused as many requests as {packed.label}: they did not do the same work, "
            f"so their throughput is not compared."
        )
    loose = alike[0] if alike[0].policy == "max-length" else min(alike, key=live)
    shares, batches = compared(loose, packed)
    gain = packed.throughput / loose.throughput if loose.throughput else 1.0
    verb = (
        "lowers" if gain < 0.995 else "hardly raises" if gain < HARDLY else
        "raises" if gain < CLEARLY else "greatly raises"
    )  # fmt: skip
    subject = f"{subject_of(packed, shares[1] > shares[0])} {verb}"
    name, share = largest_part(packed if gain < HARDLY else loose)
    whose = packed if gain < HARDLY else loose
    return (
        f"{subject} throughput here: {loose.policy} -> {PAGED} {packed.block_size} is "
        f"{shares[0]:.0f} % -> {shares[1]:.0f} % {of_what(loose, packed)}, a mean batch of "
        f"{batches[0]:.1f} -> {batches[1]:.1f}, {gain:.2f}x the tokens a second. "
        f"{share:.0f} % of the time of {whose.label} goes to {PARTS[name]}."
    )


def subject_of(packed: Result, is_denser: bool) -> str:
    """What may have changed the throughput: packing only if nothing else differs."""
    if not packed.by_engine:
        return "Better packing" if is_denser else "Paging"
    hits = f" and prefix hits of {packed.prefix_hit:.0f} %" if packed.hit_tokens else ""
    return f"Paging with the engine's scheduler{hits}, which is more than packing,"


def compared(*results: Result) -> tuple[list[float], list[float]]:
    """Live shares in percent and mean batches, averages over the same kind of time.

    That is the time in which requests wait if there is such a time in every result, and else all
    the time in which rows run: then the shares are of what is allocated.
    """
    if all(result.waiting.seconds for result in results):
        return [live(result) for result in results], [result.mean_batch for result in results]
    windows = [result.waiting + result.calm for result in results]
    shares = [100 * w.live / w.allocated if w.allocated else 0.0 for w in windows]
    return shares, [w.rows / w.seconds if w.seconds else 0.0 for w in windows]


def of_what(*results: Result) -> str:
    """What the shares of compared() are of."""
    if all(result.waiting.seconds for result in results):
        return "live"
    idle = [result.label for result in results if not result.waiting.seconds]
    return (
        f"of the allocated memory live (over all the time, as nobody waits for {' or '.join(idle)})"
    )


def live(result: Result) -> float:
    return result.shares()["live"]


def largest_part(result: Result) -> tuple[str, float]:
    """The part of StepCost that takes most of the time, and its share in percent."""
    parts = {name: getattr(result.seconds, name) for name in PARTS}
    name = max(parts, key=parts.__getitem__)
    return name, 100 * parts[name] / (result.seconds.total or 1.0)
