"""Tokens from logits: rows with equal settings go through transformers' processors together.

A seeded row draws its number from (seed, sample, position) alone, so its tokens do not depend on
what else runs, on chunks or on preemptions.

Read first: sampling.py, rules.py. Read next: engine.py.
"""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pykvcache.batch import Int64Array
from pykvcache.engine.config import ConfigRules
from pykvcache.engine.distinct import Distinct, stacked
from pykvcache.engine.rules import Processor, RowRules, Rule, Texts, look_of, process
from pykvcache.engine.sampling import LogProbs, Sampling

Filters = tuple[object, ...]

SUM_BYTES = 32 * 2**20  # of probabilities that are summed at once
DRAWS = 2**52  # numbers that may be drawn; a float64 holds this many below 1
UNDRAWABLE = "all scores are -inf, or one is nan or inf"


class Sampler:
    """Chooses the next token of each row.

    Args:
        vocabulary: V.
        eos: end-of-text tokens, which rows below min_new_tokens must not get.
        penalty: repetition penalty of rows that ask for none.
        rules: what else the model's generation config wants.
    """

    def __init__(
        self,
        vocabulary: int,
        eos: Sequence[int],
        penalty: float = 1.0,
        rules: ConfigRules | None = None,
    ) -> None:
        self._eos = [token for token in eos if 0 <= token < vocabulary]
        self._penalty, self.rules = penalty, rules

    def is_plain(self, setting: Sampling) -> bool:
        """Whether the next tokens of such a row are always its most likely ones."""
        return setting.greedy and self._is_untouched(setting, 1)

    def choose(
        self,
        logits: Tensor,
        settings: Sequence[Sampling],
        streams: Sequence[int],
        generated: Sequence[int],
        texts: Texts,
        distinct: Callable[[int], Distinct],
        ruled: Callable[[int], RowRules],
    ) -> tuple[Int64Array, dict[int, Exception]]:
        """Next tokens, int64 [R], and errors by row: of processors, or that no token can be drawn.

        Args:
            logits: [R, V] of the model; not changed.
            settings: of each row.
            streams: sample index of each row, to tell samples of one seed apart.
            generated: tokens that each row has generated so far.
            texts: prompt and output so far, read where a processor needs them.
            distinct: their different tokens, called where there is a penalty.
            ruled: those of a row for `rules`, called where there are any.
        """
        pairs = list(zip(settings, generated, strict=True))
        if all(setting.greedy and self._is_untouched(setting, n) for setting, n in pairs):
            return likeliest(logits), {}
        tokens = np.empty(len(settings), np.int64)
        errors: dict[int, Exception] = {}
        for rows in _groups(settings):
            setting, scores = settings[rows[0]], logits[rows].float()
            known = texts.select(rows)
            failed: dict[int, Exception] = {}
            made = [ruled(row) for row in rows] if self.rules is not None else []
            scores = process([each.before for each in made], known, scores, failed)
            if (penalty := self._penalty_of(setting)) != 1.0:
                ids = torch.from_numpy(stacked([distinct(row) for row in rows]))
                repetition = RepetitionPenaltyLogitsProcessor(float(penalty))
                scores = repetition(ids.to(scores.device), scores)
            if setting.min_new_tokens and self._eos:
                early = [i for i, row in enumerate(rows) if generated[row] < setting.min_new_tokens]
                scores[torch.tensor(early, dtype=torch.long)[:, None], self._eos] = -torch.inf
            scores = process([each.after for each in made], known, scores, failed)
            scores = _own(setting.processors, known, scores, failed)
            if setting.greedy:
                tokens[rows] = likeliest(scores)
                if made or setting.processors:
                    _check(scores, failed)
            else:
                scores = _warpers(setting)(None, scores)
                places = [(settings[r].seed, streams[r], generated[r]) for r in rows]
                drawn = _draw(scores, places)
                for i in np.flatnonzero(drawn < 0).tolist():
                    failed.setdefault(i, ValueError(f"no token can be drawn: {UNDRAWABLE}"))
                tokens[rows] = np.maximum(drawn, 0)
            errors |= {rows[i]: error for i, error in failed.items()}
        for error in errors.values():
            _let_go(error)
        return tokens, errors

    def _is_untouched(self, setting: Sampling, generated: int) -> bool:
        """Whether the scores of such a row are its logits."""
        return (
            not setting.processors
            and self.rules is None
            and self._penalty_of(setting) == 1.0
            and generated >= (setting.min_new_tokens or 0)
        )

    def _penalty_of(self, setting: Sampling) -> float:
        penalty = setting.repetition_penalty
        return self._penalty if penalty is None else penalty


def _let_go(error: BaseException | None) -> None:
    """Drop what the frames of a traceback hold: scores, which would live as long as an output."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _own(
    processors: Sequence[Processor], texts: Texts, scores: Tensor, errors: dict[int, Exception]
) -> Tensor:
    """What processors of users make of scores [n, V], which may be changed.

    Together where it is known what each of them looks at; else row by row, as in `generate`.
    """
    rules = [Rule(processor, look_of(processor)) for processor in processors]
    if all(rule.look is not None for rule in rules):
        return process([rules] * len(scores), texts, scores, errors)
    for row, length in enumerate(texts.lengths):
        if row in errors:
            continue
        ids = torch.from_numpy(texts.last([row], length)).to(scores.device)
        try:
            scores[row] = _processed(processors, ids, scores[row : row + 1].clone())[0]
        except Exception as error:
            errors[row] = error
    return scores


def _processed(processors: Sequence[Processor], ids: Tensor, scores: Tensor) -> Tensor:
    """What processors make of scores [1, V].

    Raises:
        TypeError, ValueError: one gives no scores of all tokens.
    """
    shape = scores.shape
    for processor in processors:
        scores = processor(ids, scores)
        name = getattr(processor, "__name__", type(processor).__name__)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            what = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"processor {name} must return float scores {list(shape)}, got {what}")
        if scores.shape != shape:
            raise ValueError(
                f"processor {name} must return scores {list(shape)}, got {list(scores.shape)}"
            )
    return scores


def _check(scores: Tensor, errors: dict[int, Exception]) -> None:
    """Note an error for each row of processed scores [n, V] that has no largest."""
    for row, best in enumerate(scores.amax(-1).tolist()):  # nan if there is one
        if math.isnan(best):
            errors.setdefault(row, ValueError("processors leave a score that is nan"))


def _warpers(setting: Sampling) -> LogitsProcessorList:
    """The filters of a setting."""
    warpers = LogitsProcessorList()
    if setting.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(setting.temperature)))
    if setting.top_k is not None:
        warpers.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p is not None and setting.top_p < 1.0:
        warpers.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p is not None:
        warpers.append(MinPLogitsWarper(setting.min_p))
    return warpers


def likeliest(logits: Tensor) -> Int64Array:
    """Index of the largest logit of each row of [R, V], the first of equals."""
    if logits.is_cpu:  # torch's argmax takes ten times as long on a CPU, in bfloat16 twenty
        best: Int64Array = logits.float().numpy().argmax(-1)
        return best
    return logits.argmax(-1).cpu().numpy()


def _groups(settings: Sequence[Sampling]) -> list[list[int]]:
    """Rows whose scores are processed alike; seeds may differ.

    Processors are told apart by identity: equal ones may hold different state, or have no hash.
    """
    kinds: dict[int, Filters] = {}
    groups: dict[Filters, list[int]] = {}
    for row, setting in enumerate(settings):
        kind = kinds.get(id(setting))
        if kind is None:
            kind = kinds[id(setting)] = (
                setting.greedy, setting.temperature, setting.top_k, setting.top_p, setting.min_p,
                setting.repetition_penalty, setting.min_new_tokens,
                *map(id, setting.processors),
            )  # fmt: skip
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def _draw(scores: Tensor, places: Sequence[tuple[int | None, int, int]]) -> Int64Array:
    """Sample each row of scores [n, V] in proportion to exp(score); -1 if that is no distribution.

    Takes the first token at which the sum of the probabilities so far exceeds a number in [0, 1).

    Args:
        places: (seed, sample, position) of each row.
    """
    numbers = torch.randint(DRAWS, (len(places),)).tolist()
    for row, place in enumerate(places):
        if place[0] is not None:
            digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
            numbers[row] = int.from_bytes(digest, "little") % DRAWS
    levels = (torch.tensor(numbers, dtype=torch.float64) / DRAWS).to(scores.device)
    size = max(SUM_BYTES // (8 * scores.shape[1]), 1)
    pairs = zip(scores.split(size), levels.split(size), strict=True)
    drawn: Int64Array = torch.cat([_drawn_at(*pair) for pair in pairs]).cpu().numpy()
    return drawn


def _drawn_at(scores: Tensor, levels: Tensor) -> Tensor:
    """The tokens [n] of scores [n, V] at levels [n] of their cumulative distributions; or -1."""
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = sums[:, -1]
    found = torch.searchsorted(sums, (levels * total)[:, None], right=True)[:, 0]
    return torch.where(total.isnan(), -1, found)


def log_probs(logits: Tensor, tokens: Int64Array, top: int) -> tuple[list[float], list[LogProbs]]:
    """Log-probabilities of tokens [R] under logits [R, V], and of the `top` likeliest per row."""
    logs = logits.float().log_softmax(-1)
    ids = torch.from_numpy(np.ascontiguousarray(tokens)).to(logs.device)
    chosen: list[float] = logs.gather(1, ids[:, None])[:, 0].tolist()
    if top == 0:
        return chosen, [{} for _ in chosen]
    values, best = logs.topk(min(top, logs.shape[1]), dim=-1)
    pairs = zip(best.tolist(), values.tolist(), strict=True)
    return chosen, [dict(zip(row, numbers, strict=True)) for row, numbers in pairs]
