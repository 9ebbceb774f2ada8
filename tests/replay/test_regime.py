"""The sentences on what better packing is worth."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvcache.bench.replay import paper
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.report import compared, regime
from pykvcache.bench.replay.workload import Workload


@pytest.mark.parametrize(("share", "words"), [("1", "hardly raises"), ("0", "greatly raises")])
def test_the_regime_is_computed(run_small, share: str, words: str) -> None:
    """Packing pays where the fixed cost of a step dominates, and not where prefill does."""
    prefill = "1000" if share == "1" else "0"
    _, out, _ = run_small("--policy", "max,paged", "--block-size", "16", "--prefill-us", prefill)
    assert words in out
    named = "computing prompts" if share == "1" else "the fixed cost of a step"
    assert f"goes to {named}" in out


def test_no_sentence_without_both_sides() -> None:
    plan = Plan.of(Workload("azure-conv", limit=30), Budget(20_000), paper.Rules(), ["paged"], [16])
    assert regime(list(plan.run())) is None


def test_the_regime_compares_the_same_time() -> None:
    """Rows of 10 tokens in slots of 20; paged, nobody waits."""
    plan = Plan.of(
        Workload("alpaca-like", limit=200), Budget(65_536), paper.Rules(), ["max", "paged"], [16]
    )
    loose, packed = plan.run()
    assert loose.waiting.seconds and not packed.waiting.seconds
    rows_seconds = [result.waiting.rows + result.calm.rows for result in (loose, packed)]
    running = [result.seconds.total for result in (loose, packed)]
    _, batches = compared(loose, packed)
    assert batches == pytest.approx([a / b for a, b in zip(rows_seconds, running, strict=True)])
    sentence = regime([loose, packed])
    assert "of the allocated memory live" in sentence and "nobody waits for paged 16" in sentence
    assert f"{batches[0]:.1f} -> {batches[1]:.1f}" in sentence


def test_more_than_packing_is_not_called_packing(run) -> None:
    options = ("--requests", "60", "--trace", "mooncake-conv", "--memory", "40GiB")
    options += ("--policy", "max,paged", "--block-size", "16")
    _, out, _ = run(*options, "--prefix-cache")
    text = " ".join(out.split())
    assert "Better packing" not in out
    assert "Paging with the engine's scheduler and prefix hits of" in text
    assert "which is more than packing" in text
    assert "Better packing" in run(*options)[1]


def test_rows_that_refused_other_requests_are_not_compared(tmp_path: Path) -> None:
    """A buddy's largest region of 512 slots cannot hold the long one."""
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n" + "20,20\n" * 40 + "600,10\n")
    policies = ["oracle-first-fit", "oracle-buddy", "paged"]
    plan = Plan.of(Workload(str(path)), Budget(700), paper.Rules(), policies, [16])
    fit, buddy, packed = plan.run()
    assert (buddy.refused, fit.refused, packed.refused) == (1, 0, 0)
    assert "oracle-first-fit -> paged 16" in str(regime([buddy, fit, packed]))
    assert "not compared" in str(regime([buddy, packed]))
