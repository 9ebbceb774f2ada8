"""The demo: one batch generates greedily, unpatched and then patched, and the two are compared.

Prompts are random tokens; their lengths are those of ShareGPT requests, shortened so that a small
model on two cores takes about a minute. Every row gets the same number of new tokens. An encoder
reads the prompts where there is one; the figures are then those of the decoder's own tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
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
    """What the demo found. `cache` is the patched run's, with its blocks still allocated.

    notes: what was done otherwise than asked, and how to read the figures; one line each.
    """

    prompt_lengths: list[int]
    new_tokens: int
    unpatched: Run
    patched: Run
    difference: Difference | None
    pool_bytes: int
    cache: Any
    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
        }


def load_model(name: str | None, dtype: torch.dtype) -> Any:
    """A model that generates text, by name or folder, or a small random Llama.

    Raises:
        OSError, ValueError: transformers cannot load that model, or it does not read text.
    """
    if name is None:
        return models.build_llama(512, 1536, 4, 8, 2, 8_192, dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError("there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if config.is_encoder_decoder and type(config) not in auto._model_mapping:
            raise ValueError(f"{config.model_type} does not read text, and the demo has no other")
        model = auto.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError):
        raise
    except Exception as error:  # of a damaged file, a library that is missing, the model's own code
        raise ValueError(f"cannot be loaded: {_one_line(error)}") from error
    if model.main_input_name != "input_ids":
        raise ValueError(f"{type(model).__name__} reads {model.main_input_name}, the demo has text")
    return model


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


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
        ValueError, TypeError: the model cannot be patched, or cannot generate so much; the message
            says why.
        Interrupted: on Ctrl-C in the patched run.
    """
    with pykvcache.patched(model, block_size=block_size):
        pass  # an unsuitable model fails here, before the long run
    lengths, notes = fit_lengths(model, lengths, new_tokens)
    inputs = _random_inputs(model, lengths)
    expected, cache, seconds = _timed_generate(model, inputs, new_tokens, advance)
    row_lengths = [length + new_tokens - 1 for length in lengths]  # the last token is not cached
    if model.config.is_encoder_decoder:
        row_lengths = [new_tokens] * len(lengths)  # with the token that the decoder starts with
        notes.append("an encoder reads the prompts; KV is of the decoder's own tokens")
    held, needed = dense_bytes(cache, row_lengths)
    if held == 0:
        raise ValueError(f"{type(model).__name__} has generated without a key-value cache")
    new = new_tokens * len(lengths)
    unpatched = Run(seconds, new / seconds, held, 1 - needed / held)
    try:
        with pykvcache.patched(model, block_size=block_size):
            tokens, cache, seconds = _timed_generate(model, inputs, new_tokens, advance)
    except KeyboardInterrupt:
        raise Interrupted(lengths, new_tokens, unpatched) from None
    cache = _self_attention(cache)
    if not isinstance(cache, pykvcache.PagedCache):
        raise ValueError(
            f"{type(model).__name__} has generated with a cache of its own when patched"
        )
    stats = cache.stats()
    waste = 1 - stats["percent"]["live"] / 100
    patched = Run(seconds, new / seconds, stats["used_blocks"] * stats["block_bytes"], waste)
    difference = first_difference(model, inputs, expected, tokens, new_tokens)
    return Comparison(
        lengths,
        new_tokens,
        unpatched,
        patched,
        difference,
        stats["pool_bytes"],
        cache,
        tuple(notes),
    )


def fit_lengths(model: Any, lengths: list[int], new_tokens: int) -> tuple[list[int], list[str]]:
    """Prompt lengths that the model has positions for, and a note if that changed them.

    Raises:
        ValueError: there are no positions for new_tokens.
    """
    name = type(model).__name__
    positions = positions_of(model.config.get_text_config(decoder=True))
    if positions is not None and new_tokens >= positions:
        raise ValueError(
            f"{new_tokens} new tokens are too many: {name} has {positions} positions, "
            f"ask for at most {positions - 1}"
        )
    if model.config.is_encoder_decoder:
        room = positions_of(model.config.get_text_config(encoder=True))
    else:
        room = None if positions is None else positions - new_tokens
    if room is None or max(lengths) <= room:
        return lengths, []
    note = f"prompts are cut to {room} tokens, those that {name} has positions for"
    return [min(length, room) for length in lengths], [note]


def positions_of(config: Any) -> int | None:
    """How many tokens a text may have by its model's config, if that says so."""
    for name in ("max_position_embeddings", "max_target_positions", "max_seq_len"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None


def _pad_token(model: Any) -> int:
    return getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) or 0


def _random_inputs(model: Any, lengths: list[int]) -> dict[str, Tensor]:
    """Random prompts, padded on the left; for an encoder on the right."""
    side = "encoder" if model.config.is_encoder_decoder else "decoder"
    vocabulary = model.config.get_text_config(**{side: True}).vocab_size
    inputs = models.random_prompts(lengths, vocabulary, _pad_token(model))
    if model.config.is_encoder_decoder:
        return {name: tensor.flip(1) for name, tensor in inputs.items()}
    return inputs


def _timed_generate(
    model: Any, inputs: dict[str, Tensor], new_tokens: int, advance: Callable[[], object]
) -> tuple[Tensor, Any, float]:
    """Tokens [B, S] of which new_tokens are new, the cache, and wall seconds."""

    def count_step(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        advance()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = time.perf_counter()
    try:
        output = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=_pad_token(model),
            return_dict_in_generate=True,
            stopping_criteria=[count_step],
        )
    except Exception as error:  # what a model's own code raises can be anything
        raise ValueError(f"{type(model).__name__} cannot generate: {_one_line(error)}") from error
    seconds = time.perf_counter() - start
    return output.sequences, getattr(output, "past_key_values", None), seconds


def _self_attention(cache: Any) -> Any:
    """The decoder's own part of an encoder-decoder cache; any other cache itself."""
    return getattr(cache, "self_attention_cache", cache)


def dense_bytes(cache: Any, row_lengths: list[int]) -> tuple[int, int]:
    """Bytes of keys and values that a dense cache holds, and how many of them rows need."""
    held, needed = 0, 0.0
    for layer in getattr(_self_attention(cache), "layers", ()):
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
    model: Any, inputs: dict[str, Tensor], expected: Tensor, tokens: Tensor, new_tokens: int
) -> Difference | None:
    """The earliest token of `tokens` that is not the one in `expected`, both [B, S]."""
    different = (tokens != expected).nonzero()
    if not len(different):
        return None
    row, column = min(different.tolist(), key=lambda position: position[1])
    text = expected[row : row + 1, :column]
    if model.config.is_encoder_decoder:
        prompt = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        out = model(**prompt, decoder_input_ids=text, use_cache=False)
    else:
        padding = int((inputs["attention_mask"][row] == 0).sum())
        out = model(text[:, padding:], use_cache=False)
    logits = out.logits[0, -1].float()
    ours, theirs = int(expected[row, column]), int(tokens[row, column])
    margin = float(logits[ours] - logits[theirs])
    step = column - (expected.shape[1] - new_tokens)
    return Difference(row, step, ours, theirs, margin)
