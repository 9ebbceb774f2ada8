"""Checks of replay's options against each other: what contradicts, and what changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from pykvcache.bench.replay.cases import BUDDIES, PAGED, Case
from pykvcache.bench.replay.synthetic import SYNTHETIC
from pykvcache.cli.bench.options import check_output, check_picture, check_results, input_files

MOST_COST = 1e9  # of a step or a token, in the unit of its option

OF_PAPER = ("trace", "memory", "model_config", "tokens", "max_len", "policy", "block_size")
OF_PAGED = (
    *("block_size", "head_room", "victim", "preemption", "swap_us", "scheduler", "prefix_cache"),
    *("token_budget", "max_running"),
)
OF_ENGINE = ("token_budget", "max_running")


class Given:
    """Which options stand on the command line."""

    def __init__(self, context: typer.Context) -> None:
        self._context = context

    def __contains__(self, name: str) -> bool:
        source = self._context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    def among(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that were given, as they are written."""
        return ["--" + name.replace("_", "-") for name in names if name in self]


def check_paper(given: Given) -> None:
    """Raise ValueError for an option that --paper would overrule."""
    for option in given.among(OF_PAPER):
        raise ValueError(f"--paper says what is replayed: leave out {option}")


def choose_scheduler(
    given: Given, scheduler: str, prefix_cache: bool, victim: str, preemption: str
) -> str:
    """The scheduler; --prefix-cache alone means the engine's.

    Raises:
        ValueError: options ask for what the engine's scheduler does not do.
    """
    if prefix_cache and "scheduler" in given and scheduler != "engine":
        raise ValueError(f"--prefix-cache needs --scheduler engine, got --scheduler {scheduler}")
    if not prefix_cache and scheduler != "engine":
        return scheduler
    if "victim" in given and victim == "newest":
        raise ValueError("the engine's scheduler preempts the cheapest row: --victim newest")
    if preemption == "swap":
        raise ValueError("the engine's scheduler computes again: --preemption swap")
    return "engine"


def unused(
    given: Given, cases: Sequence[Case], trace: str, scheduler: str, preemption: str
) -> list[str]:
    """A line for all options of a kind that change nothing here."""
    policies = {case.policy for case in cases}
    found = []
    if PAGED not in policies:
        found.append((given.among(OF_PAGED), "policy paged is not replayed"))
    else:
        if scheduler != "engine":
            found.append((given.among(OF_ENGINE), "they are of --scheduler engine"))
        if preemption != "swap":
            found.append((given.among(["swap_us"]), "nothing is swapped (--preemption swap)"))
    if not policies & set(BUDDIES):
        found.append((given.among(["buddy_rest"]), "no buddy allocator is replayed"))
    if trace not in SYNTHETIC:
        found.append((given.among(["seed", "sigma"]), "the trace is not drawn at random"))
    if "tokens" in given:
        found.append((given.among(["model_config"]), "--tokens is the budget"))
    return [f"without effect: {', '.join(names)}; {why}" for names, why in found if names]


def check_files(plot: Path | None, json: str | None, trace: str, model_config: str | None) -> None:
    """Raise BadParameter when a result could not be written, or only over an input."""
    if plot is not None:
        check_picture(plot)
    if json is not None and json != "-":
        check_output("--json", json)
    check_results(input_files(trace, model_config), plot=plot, json=json)


def check_cost(**options: float) -> None:
    """Raise ValueError for a cost that is no amount, in the units in which it was given."""
    for name, value in options.items():
        if not 0 <= value <= MOST_COST:
            raise ValueError(f"{name} must be 0 to {MOST_COST:g}, got {value:g}")
    if options["step_ms"] == 0:
        raise ValueError("step_ms must be more than 0, or a step could take no time")
