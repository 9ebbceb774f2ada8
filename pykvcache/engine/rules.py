"""Processors of many rows in few calls: rows that a processor cannot tell apart go together.

A processor of transformers looks at a part of a text only: how long it is, its last tokens, or all
of them. Texts are cut and filled up to that part, so that rows of different lengths share a call.

Read next: config.py, sampler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pykvcache.batch import Int64Array

Processor = Callable[[Any, Any], Any]
FILL = 2**62  # stands before a text that is too short; no token
MOST_TOKENS = 2**20  # of texts side by side


@dataclass(frozen=True)
class Tokens:
    """A processor looks at the last `count` tokens, or at all; others may stand before a text."""

    count: int | None = None


@dataclass(frozen=True)
class Length:
    """A processor looks at the length behind `offset`, and tells it from `low` to `high` only."""

    offset: int = 0
    low: int = 0
    high: int = FILL

    def of(self, length: int) -> int:
        """What it shall see of a text with so many tokens."""
        return min(max(length - self.offset, self.low), self.high)


Look = Tokens | Length | None  # None: at anything, so that every row goes alone

SCORES = (  # look at nothing else
    *(SuppressTokensLogitsProcessor, InfNanRemoveLogitsProcessor, LogitNormalization),
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper),
    *(TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper),
)
LENGTHS = (
    *(MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor),
    *(ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor),
    *(SuppressTokensAtBeginLogitsProcessor, ExponentialDecayLengthPenalty),
)
BIASES = (SequenceBiasLogitsProcessor, NoBadWordsLogitsProcessor)


def look_of(processor: Processor) -> Look:
    """What a processor looks at; subclasses may do anything."""
    kind = type(processor)
    if kind in SCORES:
        return Tokens(0)
    if kind in LENGTHS:
        return Length()
    if kind in BIASES:
        return Tokens(max(map(len, processor.sequence_bias)))  # type: ignore[attr-defined]
    return Tokens() if kind is NoRepeatNGramLogitsProcessor else None


@dataclass(frozen=True)
class Rule:
    """A processor, which rows may share, and what it looks at."""

    processor: Processor
    look: Look

    def key(self, row: int, length: int) -> int:
        """Equal for rows that may share a call."""
        if isinstance(self.look, Length):
            return self.look.of(length)
        if self.look is None:
            return row
        return length.bit_length() if self.look.count is None else 0


@dataclass
class RowRules:
    """Those of one row, in the order of `generate`.

    Attributes:
        before, after: the repetition penalty.
    """

    before: list[Rule] = field(default_factory=list)
    after: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class Texts:
    """Texts of rows, prompt and output so far.

    Attributes:
        lengths: tokens of each.
        read: tokens of a row from a position on.
    """

    lengths: Sequence[int]
    read: Callable[[int, int], Int64Array]

    def select(self, rows: Sequence[int]) -> Texts:
        """Those of some rows."""
        lengths = [self.lengths[row] for row in rows]
        return Texts(lengths, lambda row, start: self.read(rows[row], start))

    def last(self, rows: Sequence[int], count: int) -> Int64Array:
        """The last `count` tokens of rows, int64 [len(rows), count]; FILL before short texts."""
        ids = np.full((len(rows), count), FILL, np.int64)
        for row, target in zip(rows, ids, strict=True) if count else ():
            tokens = self.read(row, max(self.lengths[row] - count, 0))
            target[count - len(tokens) :] = tokens
        return ids


def process(
    chains: Sequence[Sequence[Rule]], texts: Texts, scores: Tensor, errors: dict[int, Exception]
) -> Tensor:
    """What chains[i] makes of row i of scores [n, V]; all chains have equally many rules.

    scores may be changed. errors: gets what a rule raises for a row; then its scores mean nothing.
    """
    for stage in zip(*chains, strict=True):
        for rows in _groups(stage, texts):
            scores = _call(stage[rows[0]], rows, texts, scores, errors)
    return scores


def _groups(stage: Sequence[Rule], texts: Texts) -> Iterator[list[int]]:
    """Rows that share a call of the processor."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (rule, length) in enumerate(zip(stage, texts.lengths, strict=True)):
        groups.setdefault((id(rule.processor), rule.key(row, length)), []).append(row)
    for rows in groups.values():
        look, most = stage[rows[0]].look, len(rows)
        if isinstance(look, Tokens) and look.count is None:
            most = max(MOST_TOKENS // max(texts.lengths[row] for row in rows), 1)
        yield from (rows[i : i + most] for i in range(0, len(rows), most))


def _call(
    rule: Rule, rows: list[int], texts: Texts, scores: Tensor, errors: dict[int, Exception]
) -> Tensor:
    everyone, one = len(rows) == len(scores), len(rows) == 1
    place = slice(rows[0], rows[0] + 1) if one else rows
    try:
        ids = _ids(rule.look, rows, texts, scores.device)
        processed: Tensor = rule.processor(ids, scores if everyone else scores[place])
    except Exception as error:
        if one:
            errors.setdefault(rows[0], error)
        else:  # whose fault it is
            for row in rows:
                scores = _call(rule, [row], texts, scores, errors)
        return scores
    if everyone:
        return processed
    scores[place] = processed
    return scores


def _ids(look: Look, rows: list[int], texts: Texts, device: torch.device) -> Tensor:
    """input_ids [len(rows), length] for a processor that looks at them so."""
    if isinstance(look, Length):
        length = look.of(texts.lengths[rows[0]])
        return torch.zeros(1, 1, dtype=torch.int64, device=device).expand(len(rows), length)
    longest = max(texts.lengths[row] for row in rows)
    count = longest if look is None or look.count is None else look.count
    return torch.from_numpy(texts.last(rows, count)).to(device)
