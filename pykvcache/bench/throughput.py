"""Requests of many lengths: the engine against a padded `generate` and transformers' batching.

All contenders complete the same 32 prompts. A padded batch runs every row to the longest output,
as `generate` does; the others give each request its own. CPU seconds are counted, on few threads.
Tokens are compared in float32 before anything is timed.

Read first: pykvcache/bench/generate.py.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import pykvcache
from pykvcache.bench import models
from pykvcache.bench import transformers_batching as batching
from pykvcache.bench.generate import Workload, generate
from pykvcache.bench.timing import Missing, Timing, WrongResult, keeping, one_line, take_turns
from pykvcache.bench.traces import read_trace
from pykvcache.block_layout import QUANTISED, BlockLayout

SHORTEST_OUTPUT = {"mixed": 16, "long": 32}
CHECKED_ROWS, CHECKED_TOKENS = 6, 8
CONTENDERS = 3
POOL = "2GiB"


@dataclass(frozen=True)
class Result:
    """CPU seconds of each contender on one workload.

    prompt_tokens, output_tokens: of the requests; a padded batch computes more.
    """

    workload: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    timings: dict[str, Timing]

    def speedup(self, contender: str) -> float:
        """Over the padded batch."""
        return self.timings["padded generate"].median / self.timings[contender].median

    def to_json(self) -> dict[str, Any]:
        """With the ratios."""
        return asdict(self) | {"speedup": {name: self.speedup(name) for name in self.timings}}


def output_lengths(workload: Workload) -> list[int]:
    """Log-uniform from the workload's shortest output to its longest."""
    draw, shortest = random.Random(workload.seed + 1), SHORTEST_OUTPUT[workload.name]
    ratio = workload.output / shortest
    return [round(shortest * ratio ** draw.random()) for _ in range(workload.batch)]


def measure(
    workload: Workload,
    repeats: int,
    longest_run: float,
    missing: dict[str, str],
    advance: Callable[..., object] = lambda steps=1: None,
) -> Result:
    """Time the contenders in turns.

    Args:
        workload: the requests.
        repeats: runs of each contender.
        longest_run: seconds; `generate_batch` is left out if it takes longer.
        missing: gets the reason when `generate_batch` is left out.
        advance: called after each run; with a number of runs for those that are left out.

    Raises:
        WrongResult: tokens differ in float32; nothing was timed.
        Interrupted: on Ctrl-C, with the Result so far.
    """
    lengths, outputs = workload.prompt_lengths(), output_lengths(workload)
    model = models.build_llama(512, 1536, 8, 8, 2, 32_000, torch.bfloat16)
    inputs = models.random_prompts(lengths, model.config.vocab_size)
    prompts = [row[-n:].tolist() for row, n in zip(inputs["input_ids"], lengths, strict=True)]
    checked = check_tokens(model, prompts)
    sampling = [pykvcache.Sampling(max_new_tokens=n) for n in outputs]
    engine = pykvcache.Engine(model, memory=POOL)

    contenders: dict[str, Callable[[int], Any]] = {
        "padded generate": lambda _: generate(model, inputs, workload.output),
        # another salt each time: prefixes of the run before are not found
        "engine": lambda run: engine.generate(prompts, sampling, salt=run, progress=False),
    }
    try:
        check_batching(model, checked, longest_run)
        batching.complete(model, prompts, outputs, longest_run)
        contenders["generate_batch"] = lambda _: batching.complete(model, prompts, outputs)
    except Missing as error:
        missing[f"generate_batch on {workload.name}"] = str(error)
        advance(repeats)
    threads, tokens = torch.get_num_threads(), (sum(lengths), sum(outputs))
    with keeping(lambda timings: Result(workload.name, threads, *tokens, timings)):
        timings = take_turns(contenders, repeats, time.process_time, advance)
    return Result(workload.name, threads, *tokens, timings)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Weights that were bfloat16 are float32 inside; nothing is lost."""
    model.float()
    try:
        yield
    finally:
        model.to(torch.bfloat16)


def check_tokens(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Compare the engine's greedy tokens with `generate`, prompt by prompt, in float32.

    Returns:
        The prompts that were compared, and what follows each.

    Raises:
        WrongResult: they differ.
    """
    some = sorted(prompts, key=len)[:CHECKED_ROWS]
    expected = []
    with in_float32(model):
        engine = pykvcache.Engine(model, num_blocks=500, token_budget=100)
        outputs = engine.generate(some, max_new_tokens=CHECKED_TOKENS, progress=False)
        for prompt, output in zip(some, outputs, strict=True):
            with torch.no_grad():
                tokens = model.generate(
                    torch.tensor([prompt]), max_new_tokens=CHECKED_TOKENS, do_sample=False
                )
            expected.append(tokens[0, len(prompt) :].tolist())
            if expected[-1] != output.token_ids:
                raise WrongResult(
                    f"tokens of a prompt of {len(prompt)} tokens differ from generate's"
                )
    return list(zip(some, expected, strict=True))


def check_batching(
    model: Any, checked: list[tuple[list[int], list[int]]], most_seconds: float
) -> None:
    """Compare `generate_batch` with the same tokens.

    Raises:
        Missing: they differ, or it fails.
    """
    prompts, expected = (list(each) for each in zip(*checked, strict=True))
    with in_float32(model):
        try:
            found = batching.complete(model, prompts, [CHECKED_TOKENS] * len(prompts), most_seconds)
        except Missing:
            raise
        except Exception as error:  # no continuous batching, or that of another version
            raise Missing(f"does not run here: {one_line(error)}") from error
    if found != expected:
        raise Missing("gives other tokens than generate")


# What the engine's own code costs.


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a decode step outside the model's forward, and the whole step."""

    rows: int
    plan: float
    settle: float
    rest: float
    step: float

    @property
    def outside(self) -> float:
        """Everything but the forward."""
        return self.plan + self.settle + self.rest


@contextmanager
def _stopwatch(owner: Any, name: str, times: list[float]) -> Iterator[None]:
    """Record how long each call of a method takes."""
    method = getattr(owner, name)

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        times.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)


def measure_overhead(rows: int, steps: int = 200) -> Overhead:
    """Median costs of decode steps with so many rows, on a one-layer model."""
    model = models.build_llama(64, 96, 1, 2, 1, 1000)
    engine = pykvcache.Engine(
        model,
        num_blocks=rows * (steps // 8 + 4),
        prefix_cache=False,
        max_running=max(256, rows),
        token_budget=max(2048, 4 * rows),
    )
    for row in range(rows):
        engine.submit([row % 900 + 1, 5, 7], max_new_tokens=steps + 20)
    for _ in range(4):  # prompts, and rows that are not plain yet
        engine.step()
    whole: list[float] = []
    plan: list[float] = []
    forward: list[float] = []
    settle: list[float] = []
    loop = engine._loop
    with (
        _stopwatch(engine, "step", whole),
        _stopwatch(loop.scheduler, "plan", plan),
        _stopwatch(loop.runner, "_forward", forward),
        _stopwatch(loop, "_settle", settle),
    ):
        for _ in range(steps):
            engine.step()
    parts = np.array([plan, settle, forward, whole])
    rest = np.maximum(parts[3] - parts[:3].sum(0), 0)
    numbers = [float(np.median(x)) * 1e6 for x in (parts[0], parts[1], rest, parts[3])]
    return Overhead(rows, *numbers)


# How many requests run at once.


@dataclass(frozen=True)
class Capacity:
    """Requests at once on one budget of KV tokens.

    padded: mean size of padded batches, requests in file order, as many as fit with the longest
        prompt and output of the batch. padded_generating: mean number of its rows that have not
        ended yet, over its steps. engine: mean number running while one waits. engine_float8: the
        same with the blocks that a float8 pool has in the bytes of a bfloat16 one, with heads of
        128.
    """

    requests: int
    budget_tokens: int
    padded: float
    padded_generating: float
    engine: float
    engine_float8: float
    engine_peak: int
    preemptions: int
    peak_bytes: int
    budget_bytes: int


def padded_batches(requests: list[tuple[int, int]], budget: int) -> list[list[int]]:
    """Consecutive batches with batch x (longest prompt + longest output) <= budget.

    Args:
        requests: prompt and output tokens of each.

    Returns:
        The output tokens of the rows of each batch.
    """
    batches: list[list[int]] = []
    prompt = output = 0
    for new_prompt, new_output in requests:
        prompt, output = max(prompt, new_prompt), max(output, new_output)
        if not batches or (len(batches[-1]) + 1) * (prompt + output) > budget:
            batches.append([])
            prompt, output = new_prompt, new_output
        batches[-1].append(new_output)
    return batches


def measure_capacity(requests: int, budget: int, block_size: int = 16) -> Capacity:
    """Run ShareGPT lengths through two engines over a tiny model."""
    trace = [(r.prompt, r.output) for r in itertools.islice(read_trace("sharegpt"), requests)]
    model = models.build_llama(16, 16, 1, 1, 1, 100)
    common: dict[str, Any] = {"max_running": 4096, "prefix_cache": False}
    blocks = budget // block_size
    engine = pykvcache.Engine(model, block_size, num_blocks=blocks, **common)
    running = _running(engine, trace)
    pool = engine.pool
    block_bytes = [
        BlockLayout(1, block_size, 128, 128, dtype).nbytes for dtype in (torch.bfloat16, QUANTISED)
    ]
    more = blocks * block_bytes[0] // block_bytes[1]
    dense = pykvcache.Engine(model, block_size, num_blocks=more, kv_dtype=QUANTISED, **common)
    batches = padded_batches(trace, budget)
    assert pool.allocator is not None
    return Capacity(
        requests,
        budget,
        float(np.mean(list(map(len, batches)))),
        sum(map(sum, batches)) / max(sum(map(max, batches)), 1),
        float(np.mean(running)),
        float(np.mean(_running(dense, trace))),
        max(running),
        engine.stats().preemptions,
        pool.allocator.peak * pool.block_bytes,
        pool.allocated_bytes,
    )


def _running(engine: pykvcache.Engine, trace: list[tuple[int, int]]) -> list[int]:
    """Requests that run, step by step, as long as one waits; then lets them all end."""
    for index, (prompt, output) in enumerate(trace):
        ids = np.random.default_rng(index).integers(1, 100, prompt)
        engine.submit(ids, pykvcache.Sampling(max_new_tokens=max(output, 1)))
    running = []
    scheduler = engine._scheduler
    while scheduler.num_waiting:
        engine.step()
        running.append(scheduler.num_running)
    while scheduler.num_running:
        engine.step()
    return running
