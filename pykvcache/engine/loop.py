"""One step of the engine: plan, forward, choose tokens, settle.

Rows that are plain (greedy, and nobody watches) are settled as arrays; Python looks at the others,
at rows that get their first token, and at rows that end.

Read first: scheduler.py, runner.py, sampler.py, handle.py. Read next: engine.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pykvcache.batch import Int64Array
from pykvcache.engine.config import ConfigRules
from pykvcache.engine.delivery import Delivery
from pykvcache.engine.distinct import Distinct
from pykvcache.engine.fresh import FreshScheduler
from pykvcache.engine.handle import Handle, Sample, ScoreJob
from pykvcache.engine.interrupts import Shield
from pykvcache.engine.request import BoolArray, Request
from pykvcache.engine.rules import RowRules, Texts
from pykvcache.engine.runner import ModelRunner
from pykvcache.engine.sampler import Sampler, likeliest, log_probs
from pykvcache.engine.sampling import Event, LogProbs
from pykvcache.engine.stats import FloatArray, Meter
from pykvcache.engine.step import Step
from pykvcache.engine.swap import SwapSpace

SLICE_BYTES = 8 * 2**20  # of logits that are repeated or scored; what is made of them is larger


class Loop:
    """Runs steps; not locked, `Engine` does that.

    Args:
        runner: the model.
        scheduler: the requests.
        swap: learns how fast prompts are computed.
        eos: end-of-text tokens.
    """

    def __init__(
        self, runner: ModelRunner, scheduler: FreshScheduler, swap: SwapSpace, eos: Sequence[int]
    ) -> None:
        self.runner, self.scheduler, self.swap = runner, scheduler, swap
        self.lanes, self.blocks = scheduler.lanes, scheduler.blocks
        self.meter, self.delivery = Meter(scheduler), Delivery[Handle]()
        self.vocabulary = runner.vocabulary  # that tokens are chosen from
        self._shrunk = False  # since requests were looked at
        self._thread = 0  # in which a step runs
        self._heard: list[Event] = []  # in the step that runs
        self._sampler = Sampler(runner.vocabulary, eos)
        self.set_ends(eos, 1.0)

    def set_ends(
        self, eos: Sequence[int], penalty: float, rules: ConfigRules | None = None
    ) -> None:
        """Take over what the model's generation config says: end-of-text tokens, penalty, rules."""
        self._eos = np.array(eos, np.int64)
        if rules is not None and rules.same(self._sampler.rules):
            rules = self._sampler.rules  # for which requests have processors already
        before, self.vocabulary = self.vocabulary, self.runner.vocabulary
        self._shrunk |= self.vocabulary < before
        self._sampler = Sampler(self.vocabulary, eos, penalty, rules)

    def step(self, shield: Shield) -> list[Event]:
        """Run one step; returns the events of watched samples, those with a listener are queued.

        The shield is open while the model runs, and closed elsewhere.
        """
        self._thread = threading.get_ident()
        try:
            if self._shrunk:
                self._end_unknown()
            with torch.inference_mode():
                self._step(shield)
            return self._heard
        finally:
            self._thread, self._heard = 0, []

    def is_inside(self) -> bool:
        """Whether a step of this thread runs: a processor asks, or a hook of the model."""
        return self._thread == threading.get_ident()

    def check_outside(self) -> None:
        """Raise RuntimeError if a step of this thread runs.

        Its rows and their logits are on the way: another step would move or end some of them.
        """
        if self.is_inside():
            raise RuntimeError(
                "step() was called inside of a step, by a processor or a hook of the model"
            )

    def _step(self, shield: Shield) -> None:
        started = time.perf_counter()
        step = self.scheduler.plan()
        if step is None:
            return
        try:
            ids = self.lanes.ids(step.lanes, step.starts, step.counts)
            shield.open = True
            logits = self.runner.run(step, ids)
            shield.open = False
            self._settle(step, ids, logits)
        except BaseException:
            shield.open = False
            self.scheduler.undo(step)
            raise
        seconds = time.perf_counter() - started
        prompts = bool((step.counts > 1).any())
        if prompts or not self.swap.token_rate:
            self.swap.observe(step.num_tokens, seconds, prompts)
        self.meter.step(len(step.lanes), step.num_tokens, seconds)

    def _end_unknown(self) -> None:
        """End requests with tokens that the model, whose vocabulary has shrunk, knows no more."""
        last = self.vocabulary - 1
        for request in self.scheduler.requests():
            owner, token = request.owner, int(self._text(request).max())
            if isinstance(owner, ScoreJob):
                token = max(token, int(owner.completion.max()))
            if token <= last:
                continue
            owner.error = ValueError(
                f"token {token} of a request is not in the vocabulary any more, "
                f"which ends at {last} now"
            )
            if isinstance(owner, Sample):
                self.end(owner, "error")
            else:
                self.scheduler.finish(request)
        self._shrunk = False

    def end(self, sample: Sample, reason: str) -> None:
        """The sample ends, wherever it is; its blocks are given back."""
        request = sample.request
        tokens = self._text(request)
        self.scheduler.finish(request)
        output = sample.end(tokens, reason)
        sample.handle.sample_ended()
        self.meter.finished(output, started=request.placed > 0 or sample.begun)
        if reason in ("cancelled", "error"):  # otherwise its last token tells
            self._tell(sample, None, None)

    def _tell(self, sample: Sample, token: int | None, logs: LogProbs | None) -> None:
        """Queue the newest event of a sample for those who watch it."""
        if not sample.watched:
            return
        event = Event(sample.prompt_index, sample.sample_index, token, logs, sample.output)
        if self._thread:
            self._heard.append(event)
        sample.handle.put_event(event)
        if sample.listener is not None:
            self.delivery.put(event, sample.listener, sample.handle)

    def _settle(self, step: Step, ids: Int64Array, logits: Tensor) -> None:
        lanes = self.lanes
        self.blocks.record(lanes.seqs[step.lanes], ids, step.counts)
        scored = lanes.logits_from[step.lanes] >= 0
        if scored.any():
            logits = self._settle_scores(step, scored, logits)
        rows = step.lanes[(step.wanted > 0) & ~scored]
        if not len(rows):
            return
        plain = lanes.plain[rows]
        if plain.all():
            self._settle_plain(rows, likeliest(logits))
            return
        others = np.flatnonzero(~plain)
        if plain.any():
            self._settle_plain(rows[plain], likeliest(logits[np.flatnonzero(plain)]))
            logits = logits[others]
        self._settle_samples(rows[others], logits)

    def _settle_plain(self, rows: Int64Array, tokens: Int64Array) -> None:
        """Take the next tokens of lanes [R] whose samples nobody watches."""
        lanes = self.lanes
        lanes.append(rows, tokens)
        self.meter.generated(len(rows), self._gaps(rows, time.perf_counter()))
        full = lanes.known[rows] >= lanes.limit[rows]
        eos = np.isin(tokens, self._eos) & lanes.ends_at_eos[rows]
        for i in np.flatnonzero(full | eos).tolist():
            request = lanes.requests[rows[i]]
            assert request is not None
            self.end(request.owner, "eos" if eos[i] else "length")

    def _settle_samples(self, rows: Int64Array, logits: Tensor) -> None:
        """The same for lanes whose samples need a look, and for those that share their prompt."""
        requests: list[Request] = []
        sources: list[int] = []
        for i, lane in enumerate(rows.tolist()):
            request = self.lanes.requests[lane]
            assert request is not None
            sharing = [request]
            if not request.owner.begun:
                sharing += self.scheduler.heirs(request)
            requests += sharing
            sources += [i] * len(sharing)
        try:
            if len(requests) == len(rows):
                self._next_tokens(requests, logits)
            else:
                self._share_logits(requests, sources, logits)
        except BaseException:
            for request in requests:  # blocks of a prompt without a first token are of no use
                if not request.owner.begun and request.lane < 0:
                    self.blocks.close(request)
            raise

    def _share_logits(
        self, requests: Sequence[Request], sources: Sequence[int], logits: Tensor
    ) -> None:
        """As `_next_tokens`, where the logits of request i are logits[sources[i]].

        A prompt may have any number of samples, and their logits no place in memory: they are
        repeated in slices, which are no larger than what is there already, or than SLICE_BYTES.
        """
        most = max(len(logits), _slice_rows(logits))
        for i in range(0, len(requests), most):
            slice_sources = torch.tensor(sources[i : i + most], device=logits.device)
            self._next_tokens(requests[i : i + most], logits[slice_sources])

    def _next_tokens(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Choose and take the next token of each request, whose logits are [R, V]."""
        samples: list[Sample] = [request.owner for request in requests]
        lengths = [self._length(request) for request in requests]
        tokens, errors = self._sampler.choose(
            logits,
            [sample.setting for sample in samples],
            [sample.sample_index for sample in samples],
            [n - len(request.prompt) for n, request in zip(lengths, requests, strict=True)],
            Texts(lengths, lambda row, start: self._text(requests[row], start)),
            lambda row: self._distinct(samples[row]),
            lambda row: self._ruled(samples[row]),
        )
        numbers = self._log_probs(samples, logits, tokens)
        now = time.perf_counter()
        good = [i for i in range(len(samples)) if i not in errors]
        self._append([requests[i] for i in good], tokens[good])
        eos = np.isin(tokens, self._eos).tolist()
        for i, (sample, token) in enumerate(zip(samples, tokens.tolist(), strict=True)):
            if not sample.begun:
                sample.begun, sample.first_token = True, now
                self._decide_plain(sample)
            if i in errors:
                sample.error = errors[i]
                self.end(sample, "error")
            else:
                self._take(sample, token, eos[i], numbers[i])

    def _append(self, requests: Sequence[Request], tokens: Int64Array) -> None:
        """Add one new token to each request, tokens [R]; some may wait."""
        now = time.perf_counter()
        lanes = np.array([request.lane for request in requests], np.int64)
        runs = lanes >= 0
        self.lanes.append(lanes[runs], tokens[runs])
        gaps = self._gaps(lanes[runs], now)
        for i in np.flatnonzero(~runs).tolist():
            requests[i].tokens = np.append(requests[i].tokens, tokens[i])
            requests[i].token_time = now
        self.meter.generated(len(requests), gaps[~np.isnan(gaps)])

    def _gaps(self, rows: Int64Array, now: float) -> FloatArray:
        """Seconds [R] since the tokens before the new ones of these lanes; nan: it is the first."""
        times = self.lanes.token_time
        gaps: FloatArray = now - times[rows]
        times[rows] = now
        return gaps

    def _decide_plain(self, sample: Sample) -> None:
        """From its first token on, a request may be settled as part of an array."""
        request = sample.request
        request.plain = sample.is_quiet and self._sampler.is_plain(sample.setting)
        if request.lane >= 0:
            self.lanes.plain[request.lane] = request.plain

    def _length(self, request: Request) -> int:
        lane = request.lane
        return len(request.tokens) if lane < 0 else int(self.lanes.known[lane])

    def _text(self, request: Request, start: int = 0) -> Int64Array:
        """Known tokens from position `start` on."""
        if request.lane < 0:
            return request.tokens[start:]
        known = self.lanes.known[request.lane]
        text: Int64Array = self.lanes.tokens[request.lane, start:known].astype(np.int64)
        return text

    def _distinct(self, sample: Sample) -> Distinct:
        """The different tokens of a sample's text; kept up to date from here on."""
        if sample.distinct is None:
            handle, request = sample.handle, sample.request
            if handle.distinct is None:
                handle.distinct = np.unique(request.prompt)
            output = self._text(request, len(request.prompt))
            sample.distinct = Distinct(handle.distinct, output)
        return sample.distinct

    def _ruled(self, sample: Sample) -> RowRules:
        """The rules of a sample for what the generation config wants."""
        rules = self._sampler.rules
        assert rules is not None
        if sample.ruled is None or sample.ruled[0] is not rules:
            request, own = sample.request, sample.setting.min_new_tokens is not None
            sample.ruled = rules, rules.of(request.prompt, request.limit, own)
        return sample.ruled[1]

    def _log_probs(
        self, samples: Sequence[Sample], logits: Tensor, tokens: Int64Array
    ) -> list[LogProbs | None]:
        """What each sample asked to know of its new token."""
        wanted = [i for i, sample in enumerate(samples) if sample.setting.logprobs is not None]
        numbers: list[LogProbs | None] = [None] * len(samples)
        if wanted:
            most = max(samples[i].setting.logprobs or 0 for i in wanted)
            chosen, top = log_probs(logits[wanted], tokens[wanted], most)
            for i, own, best in zip(wanted, chosen, top, strict=True):
                kept = list(best.items())[: samples[i].setting.logprobs]
                numbers[i] = {int(tokens[i]): own, **dict(kept)}
        return numbers

    def _take(self, sample: Sample, token: int, is_eos: bool, logs: LogProbs | None) -> None:
        """Note the newest token of a sample, and end it if that was the last."""
        if sample.distinct is not None:
            sample.distinct.add(token)
        if sample.logprobs is not None and logs is not None:
            sample.logprobs.append(logs)
        reason = self._reason(sample, is_eos)
        if reason is not None:
            self.end(sample, reason)
        self._tell(sample, token, logs)

    def _reason(self, sample: Sample, is_eos: bool) -> str | None:
        """Why a sample ends, whose newest token may be an end of text; or None."""
        request = sample.request
        if request.ends_at_eos and is_eos:
            return "eos"
        length = self._length(request)
        if stops := sample.setting.stop_sequences:
            begin = max(len(request.prompt), length - max(map(len, stops)))
            if sample.stops(self._text(request, begin)):
                return "stop"
        return "length" if length >= request.limit else None

    # Scores.

    def _settle_scores(self, step: Step, scored: BoolArray, logits: Tensor) -> Tensor:
        """Take the logits of rows that are scored; returns those of the other rows."""
        lanes = self.lanes
        ends = step.wanted.cumsum()
        others: list[int] = []
        for i, lane in enumerate(step.lanes.tolist()):
            begin, end = int(ends[i] - step.wanted[i]), int(ends[i])
            if not scored[i]:
                others += range(begin, end)
                continue
            request = lanes.requests[lane]
            assert request is not None
            job: ScoreJob = request.owner
            if end > begin:
                self._score(job, logits[begin:end])
                request.logits_from += end - begin  # not again after a preemption
                lanes.logits_from[lane] = request.logits_from
            if lanes.computed[lane] >= lanes.known[lane]:
                self.meter.scored(len(request.prompt), min(request.cached, len(request.prompt)))
                self.scheduler.finish(request)
        return logits[others]

    def _score(self, job: ScoreJob, logits: Tensor) -> None:
        """The next logits [n, V] of a completion."""
        for rows in logits.split(_slice_rows(logits)):
            done = len(job.score.logprobs)
            chosen, top = log_probs(rows, job.completion[done : done + len(rows)], job.top_k)
            job.score.logprobs += chosen
            if job.top_k:
                job.score.top += top


def _slice_rows(logits: Tensor) -> int:
    """Rows of [R, V] logits that are SLICE_BYTES, at least one."""
    return max(SLICE_BYTES // (logits.shape[1] * logits.element_size()), 1)
