"""`python -m pykvcache replay`: what a trace does to memory and throughput, policy by policy."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pykvcache.bench import tables
from pykvcache.bench.progress import task_progress
from pykvcache.bench.replay.cases import POLICIES
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.paper import (
    MAX_LEN,
    MEMORY,
    MODEL,
    PUBLISHED,
    SIGMAS,
    paper_tables,
    replay_regimes,
)
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.report import notes, regime, replay_tables
from pykvcache.bench.replay.rules import Rules, default_buddy_rest
from pykvcache.bench.replay.synthetic import DEFAULT_COUNT, SYNTHETIC
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Workload
from pykvcache.bench.traces import TRACES
from pykvcache.cli.replay_options import (
    Given,
    check_cost,
    check_files,
    check_paper,
    choose_scheduler,
    unused,
)

TRACE_NAMES = ", ".join([*TRACES, *SYNTHETIC])
ARRIVALS = ("saturated", "trace")


def replay(
    context: typer.Context,
    trace: Annotated[
        str, typer.Option(metavar="NAME|FILE", help=f"{TRACE_NAMES}, or a CSV or JSONL file.")
    ] = "azure-conv",
    memory: Annotated[
        str | None, typer.Option(help="Of the KV cache; 8GiB if nothing is said.")
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(help="A known model, or a config.json: the bytes of a token.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Token slots, instead of memory and model.")
    ] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Longest prompt + output; the longest of the trace.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help=f"{', '.join(POLICIES)}; all.")] = None,
    block_size: Annotated[
        list[str] | None,
        typer.Option(help="Of paged, any, with commas; 1, 2, 4 to 256."),
    ] = None,
    head_room: Annotated[
        float, typer.Option(help="Share of blocks kept free at admission.")
    ] = 0.05,
    victim: Annotated[str, typer.Option(help="Whom to preempt: newest or cheapest.")] = "newest",
    preemption: Annotated[str, typer.Option(help="recompute or swap.")] = "recompute",
    order: Annotated[str, typer.Option(help="fcfs; or shortest prompt first.")] = "fcfs",
    buddy_rest: Annotated[
        str | None,
        typer.Option(
            help="A rest of the memory below max-len: used or lost; used, but lost with --paper "
            "and with --max-len on a synthetic trace."
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="prefill-first; or engine, for paged: the engine's own.")
    ] = "prefill-first",
    token_budget: Annotated[int, typer.Option(help="Tokens a step of the engine.")] = 2048,
    max_running: Annotated[int, typer.Option(help="Rows of the engine.")] = 256,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Share prefixes; by the engine's scheduler.")
    ] = False,
    requests: Annotated[int | None, typer.Option(help="At most so many; all.")] = None,
    arrivals: Annotated[
        str, typer.Option(help="saturated: all wait from the start; trace: as they came.")
    ] = "saturated",
    step_ms: Annotated[float, typer.Option(help="Fixed cost of a step, ms.")] = 6.0,
    kv_ns: Annotated[float, typer.Option(help="Cost of a cached token a step, ns.")] = 45.0,
    prefill_us: Annotated[float, typer.Option(help="Cost of a prefill token, us.")] = 45.0,
    swap_us: Annotated[float, typer.Option(help="Cost of a token swapped one way, us.")] = 5.2,
    seed: Annotated[int, typer.Option(min=0, help="Of synthetic traces.")] = 0,
    sigma: Annotated[float, typer.Option(help="Of synthetic traces.")] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the shares and a block map.")
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the rows; - = standard output.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The published figure on PagedAttention, replayed.")
    ] = False,
) -> None:
    """Replay a trace of requests under every way to give them memory; no model is run."""
    given = Given(context)
    if paper:
        trace, memory, model_config, tokens = "sharegpt-like", MEMORY, MODEL, None
        max_len, policy = MAX_LEN, [case.policy for case in PUBLISHED]
        block_size = ["16"]
        requests = DEFAULT_COUNT if requests is None else requests
    try:
        if paper:
            check_paper(given)
        if arrivals not in ARRIVALS:
            raise ValueError(f"arrivals must be one of {', '.join(ARRIVALS)}, got {arrivals!r}")
        check_files(plot, json, trace, model_config)
        check_cost(step_ms=step_ms, kv_ns=kv_ns, prefill_us=prefill_us, swap_us=swap_us)
        cost = StepCost(step_ms / 1e3, kv_ns / 1e9, prefill_us / 1e6, swap_us / 1e6)
        rules = Rules(
            cost,
            arrivals == "saturated",
            head_room,
            victim,
            preemption,
            order,
            buddy_rest or default_buddy_rest(trace, max_len),
            choose_scheduler(given, scheduler, prefix_cache, victim, preemption),
            token_budget,
            max_running,
            prefix_cache,
        )
        workload = Workload(trace, max_len, requests, seed, sigma)
        budget = Budget.of(memory, model_config, tokens)
        plan = Plan.of(workload, budget, rules, split(policy), split_numbers(block_size))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(one_line(error)) from error
    console = tables.open_console(stderr=json == "-")
    for line in plan.describe():
        console.print(line, style="dim")
    for line in unused(given, plan.cases, trace, rules.scheduler, preemption):
        console.print(line)
    results, finished = run(plan)
    show(console, results)
    if paper and finished and requests:
        finished = compare_with_paper(console, plan.rules, requests, seed)
    save(console, plan, results, json, plot)
    if not finished:
        raise typer.Abort


def run(plan: Plan) -> tuple[list[Result], bool]:
    """The results, and whether all cases ran; Ctrl-C keeps those that did."""
    results: list[Result] = []
    try:
        with task_progress("replaying", plan.survey.count * len(plan.cases)) as advance:
            for result in plan.run(advance):
                results.append(result)
    except KeyboardInterrupt:
        return results, False
    except (OSError, ValueError) as error:
        raise typer.BadParameter(one_line(error)) from error
    return results, True


def show(console: Console, results: list[Result]) -> None:
    """The table, and what there is to say about it."""
    if not results:
        return
    for table in replay_tables(results, console.width):
        console.print(table)
    for note in notes(results):
        console.print(f"note: {note}")
    sentence = regime(results)
    if sentence is not None:
        console.print(sentence)


def compare_with_paper(console: Console, rules: Rules, requests: int, seed: int) -> bool:
    """Print published figures beside replayed ones; False after Ctrl-C."""
    total = requests * len(PUBLISHED) * (len(SIGMAS) + 1)
    try:
        with task_progress("the published figure", total) as advance:
            regimes = replay_regimes(requests, seed, rules, advance)
    except KeyboardInterrupt:
        return False
    console.print()
    for table in paper_tables(regimes, console.width):
        console.print(table)
    return True


def save(
    console: Console, plan: Plan, results: list[Result], json: str | None, plot: Path | None
) -> None:
    """Write what was asked for; a file that turns out bad does not stop the other one."""
    errors = []
    if json is not None and (results or json == "-"):  # after Ctrl-C an old file stays
        try:
            save_rows(json, results)
        except OSError as error:
            errors.append(f"--json: {error}")
    if plot is not None and results:
        from pykvcache.bench.replay.plots import plot_replay

        try:
            plot_replay(plan, results, plot)
            console.print(f"plot: {plot}", soft_wrap=True)
        except OSError as error:
            errors.append(f"--plot: {error}")
    if errors:
        raise OSError("; ".join(errors))


def save_rows(path: str, results: list[Result]) -> None:
    """Write a list of rows, to standard output when path is "-"."""
    text = json_module.dumps([result.to_json() for result in results], indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


def split(values: list[str] | None) -> list[str]:
    """Options that may be repeated and may hold commas, as one list."""
    return [part.strip() for value in values or () for part in value.split(",")]


def split_numbers(values: list[str] | None) -> list[int]:
    try:
        return [int(part) for part in split(values)]
    except ValueError:
        raise ValueError(f"block_size must be integers, got {','.join(values or ())!r}") from None


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
