"""The demo: one batch generates greedily, unpatched and then patched, and the two are compared.

Prompts are random tokens; their lengths are those of ShareGPT requests, shortened so that a small
model on two cores takes about a minute. Every row gets the same number of new tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import pykvcache
from pykvcache.bench import models
from pykvcache.bench.traces import read_trace

SHORTEN_BY = 8
SHORTEST, LONGEST = 4, 768
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """One `generate` of the batch.

    kv_bytes: keys and values held at the end; the blocks in use when patched.
    waste: share of kv_bytes that no token needs: padding, or the slack of last blocks.
    """

    seconds: float
    tokens_per_second: float
    kv_bytes: int
    waste: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the unpatched run, which is kept."""

    def __init__(self, prompt_lengths: list[int], new_tokens: int, unpatched: Run) -> None:
        super().__init__()
        self.prompt_lengths, self.new_tokens = prompt_lengths, new_tokens
        self.unpatched = unpatched


@dataclass(frozen=True)
class Difference:
    """The first token that differs, in order of time.

    margin: by how much the unpatched model's logit of its own choice exceeds that of the other,
    recomputed without a cache; rounding decides where it is near 0.
    """

    row: int
    step: int
    unpatched_token: int
    patched_token: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """What the demo found. `cache` is the patched run's, with its blocks still allocated."""

    prompt_lengths: list[int]
    new_tokens: int
    unpatched: Run
    patched: Run
    difference: Difference | None
    pool_bytes: int
    cache: Any

    def to_json(self) -> dict[str, Any]:
        return {
            "identical": self.difference is None,
            "difference": None if self.difference is None else asdict(self.difference),
            "prompt_lengths": self.prompt_lengths,
            "new_tokens": self.new_tokens,
            "unpatched": asdict(self.unpatched),
            "patched": asdict(self.patched),
            "pool_bytes": self.pool_bytes,
            "stats": self.cache.stats(),
        }


def load_model(name: str | None, dtype: torch.dtype) -> Any:
    """A causal model by name or folder, or a small random Llama.

    Raises:
        OSError, ValueError: transformers cannot load that model; its own message.
    """
    if name is None:
        return models.build_llama(512, 1536, 4, 8, 2, 8_192, dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def prompt_lengths(batch: int, seed: int) -> list[int]:
    """Prompt lengths of `batch` ShareGPT requests, divided by SHORTEN_BY and clipped."""
    requests = random.Random(seed).choices(list(read_trace("sharegpt")), k=batch)
    return [min(max(request.prompt // SHORTEN_BY, SHORTEST), LONGEST) for request in requests]


def compare(
    model: Any,
    lengths: list[int],
    new_tokens: int,
    block_size: int = 16,
    advance: Callable[[], object] = lambda: None,
) -> Comparison:
    """Generate unpatched, then patched; `advance` is called after each of 2 * new_tokens steps.

    Raises:
        ValueError, TypeError: the model cannot be patched; the message says why.
        Interrupted: on Ctrl-C in the patched run.
    """
    config = model.config.get_text_config(decoder=True)
    pad_token = getattr(config, "pad_token_id", None) or 0
    inputs = models.random_prompts(lengths, config.vocab_size, pad_token)
    with pykvcache.patched(model, block_size=block_size):
        pass  # an unsuitable model fails here, before the long run
    expected, cache, seconds = _timed_generate(model, inputs, new_tokens, pad_token, advance)
    row_lengths = [length + new_tokens - 1 for length in lengths]  # the last token is not cached
    held, needed = dense_bytes(cache, row_lengths)
    new = new_tokens * len(lengths)
    unpatched = Run(seconds, new / seconds, held, 1 - needed / held)
    try:
        with pykvcache.patched(model, block_size=block_size):
            tokens, cache, seconds = _timed_generate(model, inputs, new_tokens, pad_token, advance)
    except KeyboardInterrupt:
        raise Interrupted(lengths, new_tokens, unpatched) from None
    stats = cache.stats()
    waste = 1 - stats["percent"]["live"] / 100
    patched = Run(seconds, new / seconds, stats["used_blocks"] * stats["block_bytes"], waste)
    difference = first_difference(model, inputs, expected, tokens)
    return Comparison(
        lengths, new_tokens, unpatched, patched, difference, stats["pool_bytes"], cache
    )


def _timed_generate(
    model: Any,
    inputs: dict[str, Tensor],
    new_tokens: int,
    pad_token: int,
    advance: Callable[[], object],
) -> tuple[Tensor, Any, float]:
    """Tokens [B, longest + new_tokens], the cache, and wall seconds."""

    def count_step(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        advance()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = time.perf_counter()
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=pad_token,
        return_dict_in_generate=True,
        stopping_criteria=[count_step],
    )
    return output.sequences, output.past_key_values, time.perf_counter() - start


def dense_bytes(cache: Any, row_lengths: list[int]) -> tuple[int, int]:
    """Bytes of keys and values that a dense cache holds, and how many of them rows need."""
    held, needed = 0, 0.0
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
            continue
        kept = keys.shape[-2]
        layer_bytes = keys.nbytes + values.nbytes
        held += layer_bytes
        real = sum(min(kept, length) for length in row_lengths)
        needed += layer_bytes * real / (kept * len(row_lengths))
    return held, round(needed)


@torch.inference_mode()
def first_difference(
    model: Any, inputs: dict[str, Tensor], expected: Tensor, tokens: Tensor
) -> Difference | None:
    """The earliest token of `tokens` that is not the one in `expected`, both [B, S]."""
    different = (tokens != expected).nonzero()
    if not len(different):
        return None
    row, column = min(different.tolist(), key=lambda position: position[1])
    prompt = inputs["input_ids"].shape[1]
    start = prompt - int(inputs["attention_mask"][row].sum())
    logits = model(expected[row : row + 1, start:column], use_cache=False).logits[0, -1].float()
    ours, theirs = int(expected[row, column]), int(tokens[row, column])
    margin = float(logits[ours] - logits[theirs])
    return Difference(row, column - prompt, ours, theirs, margin)
