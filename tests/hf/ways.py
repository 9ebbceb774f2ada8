"""The ways of generating that a patched model must not change; each returns all it computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import DEVICE
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

NEW_TOKENS = 16
PADS = (0, 3, 7)
PROMPT = 11


@dataclass
class Result:
    """Tokens must be equal, floats close."""

    tokens: list[Tensor]
    floats: list[Tensor]


def inputs_for(model: PreTrainedModel, rows: int = len(PADS)) -> dict[str, Tensor]:
    """A batch with padding: left for decoders, right for encoders."""
    generator = torch.Generator().manual_seed(7)
    if model.config.model_type == "whisper":
        frames = 2 * model.config.max_source_positions
        shape = (rows, model.config.num_mel_bins, frames)
        return {"input_features": torch.randn(shape, generator=generator).to(DEVICE)}
    ids = torch.randint(3, 97, (rows, PROMPT), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS[:rows]):
        columns = slice(PROMPT - pad, None) if model.config.is_encoder_decoder else slice(pad)
        mask[row, columns] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def greedy_tokens(model: PreTrainedModel, **options: Any) -> Tensor:
    """Greedy tokens of the padded batch."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    tokens: Tensor = model.generate(**inputs_for(model), **options)
    return tokens


def _random_ids(seed: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (len(PADS), tokens), generator=generator).to(DEVICE)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Result:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    out = model.generate(
        **inputs, return_dict_in_generate=True, output_logits=True, use_cache=True, **options
    )
    scores = getattr(out, "sequences_scores", None)
    floats = [*(out.logits or ()), *([] if scores is None else [scores])]
    return Result([out.sequences], floats)


def logits(model: PreTrainedModel) -> Result:
    """Two plain forwards, the second on the cache that the first returned."""
    inputs = inputs_for(model)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            first = _random_ids(5, 8)
            before = model(**inputs, decoder_input_ids=first, use_cache=True)
            encoded = before.encoder_last_hidden_state
            inputs.pop("input_ids", inputs.pop("input_features", None))
            after = model(
                **inputs,
                encoder_outputs=(encoded,),
                decoder_input_ids=first[:, :5],
                past_key_values=before.past_key_values,
            )
            return Result([], [before.logits, after.logits])
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        extra = {"position_ids": positions} if _takes_positions(model) else {}
        before = model(**inputs, **extra, use_cache=True)
        more = _random_ids(5, 5)
        if extra:
            extra["position_ids"] = positions[:, -1:] + torch.arange(1, 6).to(DEVICE)
        after = model(
            input_ids=more,
            attention_mask=torch.cat([mask, torch.ones_like(more)], 1),
            past_key_values=before.past_key_values,
            **extra,
        )
    return Result([], [before.logits[mask.bool()], after.logits])


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in model.forward.__code__.co_varnames


def greedy(model: PreTrainedModel) -> Result:
    """A padded batch, with the logits of every step."""
    return _generate(model, inputs_for(model))


def end_of_text(model: PreTrainedModel) -> Result:
    """Rows that finish at different steps."""
    return _generate(model, inputs_for(model), eos_token_id=list(range(3, 20)))


def sampling(model: PreTrainedModel) -> Result:
    """Several returned sequences per prompt."""
    return _generate(model, inputs_for(model), do_sample=True, num_return_sequences=3, top_k=0)


def beam_search(model: PreTrainedModel) -> Result:
    """Beams that split and die share blocks."""
    return _generate(model, inputs_for(model), num_beams=4, num_return_sequences=2)


def beam_sampling(model: PreTrainedModel) -> Result:
    """Beams with drawn continuations."""
    return _generate(model, inputs_for(model), num_beams=3, do_sample=True, top_k=0)


def chunked_prefill(model: PreTrainedModel) -> Result:
    """The prompt in chunks, some of which are all padding in a row."""
    return _generate(model, inputs_for(model), prefill_chunk_size=4)


def assisted(model: PreTrainedModel) -> Result:
    """Drafts of a similar model, some of them rejected."""
    return _generate(model, inputs_for(model, 1), assistant_model=assistant_of(model))


def assisted_sampling(model: PreTrainedModel) -> Result:
    """Speculative sampling."""
    draft = assistant_of(model)
    return _generate(model, inputs_for(model, 1), assistant_model=draft, do_sample=True, top_k=0)


def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model with some noise; patched when the model is."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            parameter.add_(0.03 * noise * parameter.abs().mean())
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


def prompt_lookup(model: PreTrainedModel) -> Result:
    """Drafts copied from a prompt that repeats itself."""
    inputs = inputs_for(model, 1)
    if "input_ids" in inputs:
        inputs = {name: tensor.repeat(1, 2) for name, tensor in inputs.items()}
    return _generate(model, inputs, prompt_lookup_num_tokens=3)


def streaming(model: PreTrainedModel) -> Result:
    """A streamer sees every token."""

    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            self.seen.append(torch.tensor([-1]))

    collector = Collector()
    result = _generate(model, inputs_for(model, 1), streamer=collector)
    return Result([*result.tokens, torch.cat(collector.seen)], result.floats)


def continued(model: PreTrainedModel) -> Result:
    """generate() again on the cache that generate() returned, with more input."""
    inputs = inputs_for(model)
    first = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    if model.config.is_encoder_decoder:
        options = {"decoder_input_ids": first.sequences, "past_key_values": cache}
        return _generate(model, inputs, **options)
    more = _random_ids(5, 4)
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.ones_like(ids)
    mask[:, :PROMPT] = inputs["attention_mask"]
    return _generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)


def branched(model: PreTrainedModel) -> Result:
    """One prompt's cache, copied for each of three continuations."""
    inputs = inputs_for(model)
    prefix: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        prefix["decoder_input_ids"] = _random_ids(5, 6)
    with torch.no_grad():
        cache = model(**inputs, **prefix, use_cache=True).past_key_values
    results = []
    for seed in range(3):
        more = _random_ids(seed, 3)
        if prefix:
            both = {
                **inputs,
                "decoder_input_ids": torch.cat([prefix["decoder_input_ids"], more], 1),
            }
        else:
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
            both = {"input_ids": torch.cat([inputs["input_ids"], more], 1), "attention_mask": mask}
        results.append(_generate(model, both, past_key_values=copy.deepcopy(cache)))
    return Result(
        [tokens for result in results for tokens in result.tokens],
        [floats for result in results for floats in result.floats],
    )


WAYS: dict[str, Callable[[PreTrainedModel], Result]] = {
    way.__name__: way
    for way in (
        logits,
        greedy,
        end_of_text,
        sampling,
        beam_search,
        beam_sampling,
        assisted,
        assisted_sampling,
        prompt_lookup,
        chunked_prefill,
        streaming,
        continued,
        branched,
    )
}
