"""`generate` of a padded batch: unpatched, patched, and with attention that does nothing.

The last one is the most that swapping attention alone can buy. Each row runs to the longest output,
so every variant takes the same steps; CPU seconds are counted, on few threads, because they do not
grow when something else uses the machine. Tokens are compared in float32 before anything is timed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import pykvcache
from pykvcache.bench import models
from pykvcache.bench.timing import Timing, WrongResult, keeping, take_turns

NO_OP = "pykvcache_benchmark_no_op"
CHECKED_ROWS, CHECKED_TOKENS = 4, 8
STEP_PROMPT, STEP_TOKENS = 128, 256


@dataclass(frozen=True)
class Workload:
    """A batch: prompt lengths are drawn log-uniformly; every row gets `output` new tokens.

    The seeds are ones whose prompts sum to 4,752 (mixed) and 38,400 tokens (long).
    """

    name: str
    shortest: int
    longest: int
    output: int
    seed: int
    batch: int = 32

    def prompt_lengths(self) -> list[int]:
        draw = random.Random(self.seed)
        ratio = self.longest / self.shortest
        return [round(self.shortest * ratio ** draw.random()) for _ in range(self.batch)]


WORKLOADS = {
    "mixed": Workload("mixed", 16, 512, 128, seed=8104),
    "long": Workload("long", 512, 2048, 128, seed=5539),
}


@dataclass(frozen=True)
class Result:
    """CPU seconds of each variant on one workload, and what the KV cache took.

    timings: "unpatched", "patched" and "no attention".
    used_bytes: most blocks in use at once x bytes a block.
    padded_bytes: batch x (longest prompt + longest output) x bytes a token.
    """

    workload: str
    threads: int
    timings: dict[str, Timing]
    used_bytes: int
    pool_bytes: int
    padded_bytes: int

    def speedup(self, variant: str) -> float:
        return self.timings["unpatched"].median / self.timings[variant].median

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": {name: self.speedup(name) for name in self.timings}}


def measure(
    workload: Workload,
    repeats: int,
    block_size: int = 16,
    advance: Callable[[], object] = lambda: None,
) -> Result:
    """Time the three variants in turns, `repeats` times; calls `advance` after each run.

    Raises:
        WrongResult: patched and unpatched tokens differ in float32; nothing was timed.
        Interrupted: on Ctrl-C, with the Result so far.
    """
    lengths = workload.prompt_lengths()
    model = models.build_llama(512, 1536, 8, 8, 2, 32_000, torch.bfloat16)
    inputs = models.random_prompts(lengths, model.config.vocab_size)
    check_tokens(model, lengths, block_size)

    cache: Any = None

    def unpatched(_: int) -> None:
        generate(model, inputs, workload.output)

    def patched(_: int) -> None:
        nonlocal cache
        with pykvcache.patched(model, block_size=block_size):
            cache = generate(model, inputs, workload.output).past_key_values

    def without_attention(_: int) -> None:
        model.set_attn_implementation(NO_OP)
        generate(model, inputs, workload.output)
        model.set_attn_implementation("sdpa")

    register_no_op()
    variants = {"unpatched": unpatched, "patched": patched, "no attention": without_attention}

    def result(timings: dict[str, Timing]) -> Result:
        stats = cache.stats()
        slots = workload.batch * (max(lengths) + workload.output)
        return Result(
            workload.name,
            torch.get_num_threads(),
            timings,
            stats["peak_bytes"],
            stats["pool_bytes"],
            slots * stats["block_bytes"] // block_size,
        )

    with keeping(result):
        timings = take_turns(variants, repeats, time.process_time, advance)
    return result(timings)


def measure_step(
    repeats: int, block_size: int = 16, advance: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Seconds a token of `generate` at batch 1, on a 2-layer Llama of hidden size 256 in float32.

    STEP_TOKENS steps after a prompt of STEP_PROMPT tokens, whose prefill is counted with them.

    Raises:
        Interrupted: on Ctrl-C, with the timings so far.
    """
    model = models.build_llama(256, 768, 2, 4, 2, 4_096)
    inputs = models.random_prompts([STEP_PROMPT], model.config.vocab_size)

    def unpatched(_: int) -> None:
        generate(model, inputs, STEP_TOKENS)

    def patched(_: int) -> None:
        with pykvcache.patched(model, block_size=block_size):
            generate(model, inputs, STEP_TOKENS)

    def result(timings: dict[str, Timing]) -> dict[str, Timing]:
        return {name: timing.over(STEP_TOKENS) for name, timing in timings.items()}

    variants = {"unpatched": unpatched, "patched": patched}
    with keeping(result):
        timings = take_turns(variants, repeats, time.process_time, advance)
    return result(timings)


def generate(model: Any, inputs: dict[str, Any], new_tokens: int) -> Any:
    """Greedy `generate` of `new_tokens` a row; the result has sequences and past_key_values."""
    return model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
    )


def check_tokens(model: Any, lengths: list[int], block_size: int) -> None:
    """Raise WrongResult unless a few short rows get the same tokens patched and unpatched."""
    dtype = model.dtype
    model.float()
    inputs = models.random_prompts(sorted(lengths)[:CHECKED_ROWS], model.config.vocab_size)
    expected = generate(model, inputs, CHECKED_TOKENS).sequences
    with pykvcache.patched(model, block_size=block_size):
        tokens = generate(model, inputs, CHECKED_TOKENS).sequences
    model.to(dtype)
    if not torch.equal(tokens, expected):
        raise WrongResult("patched and unpatched generate differ in float32; nothing was timed")


def register_no_op() -> None:
    """Make NO_OP an attention implementation: zeros, with the masks that sdpa gets."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def no_op(
        module: object, query: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        return query.new_zeros(query.transpose(1, 2).shape), None

    AttentionInterface.register(NO_OP, no_op)
    AttentionMaskInterface.register(NO_OP, sdpa_mask)
