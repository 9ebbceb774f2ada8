"""transformers' own continuous batching, which `generate_batch` runs, as a peer of the engine."""

from __future__ import annotations

import time
from typing import Any

from pykvcache.bench.timing import Missing
from pykvcache.bench.transformers_paged import page_option

PAGES, PAGE, STEP_TOKENS = 200, 256, 2048
MOST_SECONDS = 3600.0


def complete(
    model: Any, prompts: list[list[int]], outputs: list[int], most_seconds: float = MOST_SECONDS
) -> list[list[int]]:
    """Greedy tokens of each prompt, each with a length of its own.

    Args:
        model: a transformers model.
        prompts: token ids.
        outputs: new tokens of each prompt.
        most_seconds: wall time after which the requests that are left are cancelled.

    Raises:
        Missing: that time has passed, or the library's worker has stopped.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    batching = ContinuousBatchingConfig(
        num_blocks=PAGES, max_batch_tokens=STEP_TOKENS, **page_option(PAGE)
    )
    end = time.perf_counter() + most_seconds
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=batching,
    ) as manager:
        names = [
            manager.add_request(prompt, max_new_tokens=count)
            for prompt, count in zip(prompts, outputs, strict=True)
        ]
        try:
            found = _results(manager, len(names), end)
        except BaseException:
            for name in names:  # leaving waits for what was not cancelled
                manager.cancel_request(name)
            raise
    return [found[name] for name in names]


def _results(manager: Any, count: int, end: float) -> dict[str, list[int]]:
    """Tokens by name of `count` requests; raises Missing."""
    found: dict[str, list[int]] = {}
    while len(found) < count:
        result = manager.get_result(timeout=max(0.0, end - time.perf_counter()))
        if result is not None and result.error:
            raise Missing(f"stops at an error: {result.error.splitlines()[0]}")
        if result is not None:
            found[result.request_id] = result.generated_tokens
        elif manager.is_running():
            raise Missing("takes longer than --longest-run")
        else:
            raise Missing("stops")
    return found
