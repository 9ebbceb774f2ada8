"""What a model's generation config does to the tokens of a request, by transformers' processors.

Read next: sampler.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from pykvcache.batch import Int64Array

Processor = Callable[[Any, Any], Any]

FOLLOWED = {  # and the value besides None that changes nothing
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
BEFORE = ("sequence_bias", "encoder_repetition_penalty")  # the repetition penalty
NEED_EOS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
IGNORED = {  # of those that change greedy tokens
    "num_beams": 1,
    "guidance_scale": 1,
    "watermarking_config": None,
    "penalty_alpha": 0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "token_healing": False,
    "stop_strings": None,
    "max_time": None,
}


@dataclass
class RowProcessors:
    """Those of one request, in the order of `generate`.

    Attributes:
        before, after: the repetition penalty.
    """

    before: list[Processor] = field(default_factory=list)
    after: list[Processor] = field(default_factory=list)


class ConfigRules:
    """Fields of a generation config that need processors for each request.

    Args:
        config: read now.
        eos: end-of-text tokens; those outside of the vocabulary do not matter.
        device: of the logits.

    Raises:
        ValueError, TypeError: a field is out of range.
    """

    def __init__(
        self, config: GenerationConfig, eos: list[int], vocabulary: int, device: torch.device
    ) -> None:
        self.fields = copy.deepcopy(_set_fields(config, FOLLOWED))
        self.ignored = tuple(_set_fields(config, IGNORED))
        self._eos = [token for token in eos if 0 <= token < vocabulary]
        self._device = str(device)
        if self.fields:
            self.processors(np.zeros(1, np.int64), 2, False)  # what is out of range shows now

    def same(self, other: ConfigRules | None) -> bool:
        """Whether they make the same processors."""
        return other is not None and (self.fields, self._eos) == (other.fields, other._eos)

    def processors(self, prompt: Int64Array, limit: int, own_minimum: bool) -> RowProcessors:
        """For a text that begins with `prompt` and has at most `limit` tokens.

        own_minimum: the request says itself how many tokens it has at least.
        """
        fields, made = dict(self.fields), RowProcessors()
        if own_minimum:
            fields.pop("min_length", None)
            fields.pop("min_new_tokens", None)
        elif "min_new_tokens" in fields:
            fields.pop("min_length", None)
        ids = torch.tensor(prompt, device=self._device)[None]
        for name, value in fields.items():
            stage = made.before if name in BEFORE else made.after
            stage += self._make(name, value, ids, limit)
        return made

    def _make(self, name: str, value: Any, prompt: Tensor, limit: int) -> list[Any]:
        """The processor of one field; none where it needs an end of text and there is none."""
        length, device = prompt.shape[1], self._device
        if name in NEED_EOS and not self._eos:
            return []
        eos = torch.tensor(self._eos, device=device) if self._eos else None
        begin = length + int(length == 1 and "forced_bos_token_id" in self.fields)
        make: dict[str, Callable[[], Any]] = {
            "sequence_bias": lambda: SequenceBiasLogitsProcessor(value),
            "encoder_repetition_penalty": lambda: EncoderRepetitionPenaltyLogitsProcessor(
                value, prompt
            ),
            "no_repeat_ngram_size": lambda: NoRepeatNGramLogitsProcessor(value),
            "encoder_no_repeat_ngram_size": lambda: EncoderNoRepeatNGramLogitsProcessor(
                value, prompt
            ),
            "bad_words_ids": lambda: NoBadWordsLogitsProcessor(value, eos),
            "min_length": lambda: MinLengthLogitsProcessor(value, eos, device),
            "min_new_tokens": lambda: MinNewTokensLengthLogitsProcessor(length, value, eos, device),
            "forced_bos_token_id": lambda: ForcedBOSTokenLogitsProcessor(value),
            "forced_eos_token_id": lambda: ForcedEOSTokenLogitsProcessor(limit, value, device),
            "remove_invalid_values": InfNanRemoveLogitsProcessor,
            "exponential_decay_length_penalty": lambda: ExponentialDecayLengthPenalty(
                value, eos, length
            ),
            "suppress_tokens": lambda: SuppressTokensLogitsProcessor(value, device),
            "begin_suppress_tokens": lambda: SuppressTokensAtBeginLogitsProcessor(
                value, begin, device
            ),
        }
        return [make[name]()]


def _set_fields(config: GenerationConfig, neutral: dict[str, Any]) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in neutral}
    return {
        name: value for name, value in found.items() if value is not None and value != neutral[name]
    }
