"""Tokens from logits: rows with equal settings go through transformers' processors together.

A seeded row draws its noise from (seed, sample, position) alone, so its tokens do not depend on
what else runs, on chunks or on preemptions.

Read first: sampling.py. Read next: engine.py.
"""

from __future__ import annotations

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
from pykvcache.engine.sampling import LogProbs, Sampling

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that multiples modulo 2**64 are all different


class Sampler:
    """Chooses the next token of each row.

    Args:
        eos: end-of-text tokens, which rows below min_new_tokens must not get.
    """

    def __init__(self, eos: Sequence[int]) -> None:
        self._eos = list(eos)

    def choose(
        self,
        logits: Tensor,
        settings: Sequence[Sampling],
        streams: Sequence[int],
        generated: Sequence[int],
        texts: Callable[[int], Int64Array],
    ) -> Int64Array:
        """Next tokens, int64 [R].

        Args:
            logits: [R, V] of the model; not changed.
            settings: of each row.
            streams: sample index of each row, to tell samples of one seed apart.
            generated: tokens that each row has generated so far.
            texts: prompt and output so far of a row, called where a processor needs them.
        """
        if all(s.greedy and _is_plain(s, n) for s, n in zip(settings, generated, strict=True)):
            return likeliest(logits)
        tokens = np.empty(len(settings), np.int64)
        for setting, rows in _groups(settings):
            scores = logits[rows].float()
            scores = self._process(setting, rows, scores, generated, texts)
            if setting.greedy:
                chosen = scores.argmax(-1)
            else:
                chosen = _draw(scores, setting.seed, [(streams[r], generated[r]) for r in rows])
            tokens[rows] = chosen.cpu().numpy()
        return tokens

    def _process(
        self,
        setting: Sampling,
        rows: list[int],
        scores: Tensor,
        generated: Sequence[int],
        texts: Callable[[int], Int64Array],
    ) -> Tensor:
        """Scores [n, V] after all processors of rows with one setting."""
        if setting.processors or setting.repetition_penalty != 1.0:
            words = [torch.from_numpy(texts(row)).to(scores.device) for row in rows]
            penalty = RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)
            custom = LogitsProcessorList(setting.processors)
            for i, ids in enumerate(words):
                scores[i : i + 1] = penalty(ids[None], custom(ids[None], scores[i : i + 1]))
        if setting.min_new_tokens and self._eos:
            early = [i for i, row in enumerate(rows) if generated[row] < setting.min_new_tokens]
            scores[torch.tensor(early, dtype=torch.long)[:, None], self._eos] = -torch.inf
        if setting.greedy:
            return scores
        warpers = LogitsProcessorList()
        if setting.temperature not in (None, 1.0):
            warpers.append(TemperatureLogitsWarper(float(setting.temperature)))
        if setting.top_k is not None:
            warpers.append(TopKLogitsWarper(setting.top_k))
        if setting.top_p is not None and setting.top_p < 1.0:
            warpers.append(TopPLogitsWarper(setting.top_p))
        if setting.min_p is not None:
            warpers.append(MinPLogitsWarper(setting.min_p))
        warped: Tensor = warpers(None, scores)
        return warped


def likeliest(logits: Tensor) -> Int64Array:
    """Index of the largest logit of each row of [R, V], the first of equals."""
    if logits.is_cpu:  # torch's argmax takes ten times as long on a CPU, in bfloat16 twenty
        best: Int64Array = logits.float().numpy().argmax(-1)
        return best
    return logits.argmax(-1).cpu().numpy()


def _is_plain(setting: Sampling, generated: int) -> bool:
    """Whether the row's scores are its logits."""
    return (
        not setting.processors
        and setting.repetition_penalty == 1.0
        and generated >= setting.min_new_tokens
    )


def _groups(settings: Sequence[Sampling]) -> list[tuple[Sampling, list[int]]]:
    """Rows of each setting object; requests of one call share it."""
    by_identity: dict[int, list[int]] = {}
    for row, setting in enumerate(settings):
        by_identity.setdefault(id(setting), []).append(row)
    return [(settings[rows[0]], rows) for rows in by_identity.values()]


def _draw(scores: Tensor, seed: int | None, streams: list[tuple[int, int]]) -> Tensor:
    """Sample each row of scores [n, V] in proportion to exp(score).

    The largest of score - log(E), E exponential noise, is such a sample (Gumbel-max trick).
    """
    noise = torch.empty(scores.shape, dtype=torch.float32, device="cpu")
    if seed is None:
        noise.exponential_()
    else:
        generator = torch.Generator()
        for row, (sample, position) in zip(noise, streams, strict=True):
            place = (seed * 3 + sample * 2**20 + position + 1) * _SEED_STRIDE
            generator.manual_seed(place % 2**63)
            row.exponential_(generator=generator)
    return (scores - noise.to(scores.device).log()).argmax(-1)


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
