"""What a model's generation config does to the tokens of a request, by transformers' processors.

Read first: rules.py. Read next: sampler.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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
from pykvcache.engine.rules import Length, Processor, RowRules, Rule, look_of

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
NEED_PROMPT = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"}
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


class ConfigRules:
    """Fields of a generation config that need processors.

    Requests share these: one that counts from the end of a prompt is made for a prompt without
    tokens, and sees lengths behind that of each request. Only those that know the prompt itself
    are made for each.

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
        if not self._eos:
            self.fields = {k: v for k, v in self.fields.items() if k not in NEED_EOS}
        self._vocabulary, self._device = vocabulary, str(device)
        self._shared: dict[str, Processor] = {}
        for name, value in self.fields.items():  # what is out of range shows now
            processor = self._make(name, value, torch.zeros(1, 1, dtype=torch.int64))
            if name not in NEED_PROMPT:
                self._shared[name] = processor

    def same(self, other: ConfigRules | None) -> bool:
        """Whether they make the same processors."""
        return other is not None and self._facts == other._facts

    @property
    def _facts(self) -> tuple[object, ...]:
        return self.fields, self._eos, self._vocabulary

    def of(self, prompt: Int64Array, limit: int, own_minimum: bool) -> RowRules:
        """For a text that begins with `prompt` and has at most `limit` tokens.

        own_minimum: the request says itself how many tokens it has at least.
        """
        fields, rules = dict(self.fields), RowRules()
        if own_minimum:
            fields.pop("min_length", None)
            fields.pop("min_new_tokens", None)
        elif "min_new_tokens" in fields:
            fields.pop("min_length", None)
        ids = torch.tensor(prompt, device=self._device)[None] if NEED_PROMPT & set(fields) else None
        for name, value in fields.items():
            processor = self._shared.get(name) or self._make(name, value, ids)
            look = self._look(name, len(prompt), limit) or look_of(processor)
            stage = rules.before if name in BEFORE else rules.after
            stage.append(Rule(processor, look))
        return rules

    def _make(self, name: str, value: Any, prompt: Tensor | None) -> Any:
        """The processor of one field, for the lengths that `_look` gives."""
        device = self._device
        eos = torch.tensor(self._eos, dtype=torch.int64, device=device)
        make: dict[str, Callable[[], Any]] = {
            "sequence_bias": lambda: SequenceBiasLogitsProcessor(value),
            "encoder_repetition_penalty": lambda: EncoderRepetitionPenaltyLogitsProcessor(
                value, prompt
            ),
            "no_repeat_ngram_size": lambda: NoRepeatNGramLogitsProcessor(value),
            "encoder_no_repeat_ngram_size": lambda: EncoderNoRepeatNGramLogitsProcessor(
                value, prompt
            ),
            "bad_words_ids": lambda: NoBadWordsLogitsProcessor(value, eos if self._eos else None),
            "min_length": lambda: MinLengthLogitsProcessor(value, eos, device),
            "min_new_tokens": lambda: MinNewTokensLengthLogitsProcessor(0, value, eos, device),
            "forced_bos_token_id": lambda: ForcedBOSTokenLogitsProcessor(value),
            "forced_eos_token_id": lambda: ForcedEOSTokenLogitsProcessor(2, value, device),
            "remove_invalid_values": InfNanRemoveLogitsProcessor,
            "exponential_decay_length_penalty": lambda: ExponentialDecayLengthPenalty(
                value, eos, 0
            ),
            "suppress_tokens": lambda: SuppressTokensLogitsProcessor(value, device),
            "begin_suppress_tokens": lambda: SuppressTokensAtBeginLogitsProcessor(value, 1, device),
        }
        return make[name]()

    def _look(self, name: str, prompt: int, limit: int) -> Length | None:
        """The lengths that a processor of `_make` shall see; None: it does not count."""
        value = self.fields[name]
        match name:
            case "min_length":
                return Length(0, value - 1, value)
            case "min_new_tokens":
                return Length(prompt, value - 1, value)
            case "forced_bos_token_id":
                return Length(0, 1, 2)
            case "forced_eos_token_id":
                return Length(limit - 2, 0, 1)
            case "exponential_decay_length_penalty":
                return Length(prompt, max(int(value[0]), 0))
            case "begin_suppress_tokens":
                forced = prompt == 1 and "forced_bos_token_id" in self.fields
                return Length(prompt + forced - 1, 0, 2)
        return None


def _set_fields(config: GenerationConfig, neutral: dict[str, Any]) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in neutral}
    return {
        name: value for name, value in found.items() if value is not None and value != neutral[name]
    }
