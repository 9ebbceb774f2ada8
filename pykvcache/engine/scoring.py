"""Log-probabilities of completions: `Scorer`, which `Engine.score` runs.

The prompt but its last token is computed once, by a request that keeps its blocks; every completion
is a request that goes on from a fork of them and wants the logits of its own positions.

Read first: handle.py, scheduler.py. Read next: engine.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from pykvcache.batch import Int64Array
from pykvcache.engine.handle import ScoreJob
from pykvcache.engine.interrupts import uninterrupted
from pykvcache.engine.request import Request
from pykvcache.engine.sampling import Score
from pykvcache.engine.scheduler import Scheduler

NO_LOGITS = 2**31  # the first position whose logits are wanted, of a text that is only computed


class Scorer:
    """Scores completions of one prompt.

    Args:
        scheduler: of the engine, used under `lock`.
        lock: of the engine.
        step: runs one step of the engine.
        new_request: makes a request for a text; raises ValueError if it is too long.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lock: threading.RLock,
        step: Callable[[], object],
        new_request: Callable[[Int64Array], Request],
    ) -> None:
        self._scheduler, self._lock, self._step = scheduler, lock, step
        self._new_request = new_request

    def score(
        self, prompt: Int64Array, completions: Sequence[Int64Array], top_k: int
    ) -> list[Score]:
        """One score for each completion; nothing is left behind, whatever happens.

        Raises:
            ValueError: one of them could never fit; nothing was started.
        """
        jobs = [ScoreJob(completion, top_k) for completion in completions]
        texts = [np.concatenate([prompt, job.completion[:-1]]) for job in jobs]
        requests = [
            self._request(text, job, len(prompt) - 1) for text, job in zip(texts, jobs, strict=True)
        ]
        for request in requests:
            self._scheduler.check(request)
        begun = None
        if len(prompt) > 1 and jobs:
            begun = self._request(prompt[:-1], ScoreJob(prompt[:-1], 0, keep=True), NO_LOGITS)
        with uninterrupted() as shield:
            try:
                shield.open = True
                if begun is not None:
                    self._compute(begun)
                self._submit(requests, begun)
                while not all(request.done for request in requests):
                    self._step()
            finally:
                shield.open = False
                self._give_back(requests if begun is None else [begun, *requests])
        return [job.score for job in jobs]

    def _request(self, text: Int64Array, job: ScoreJob, logits_from: int) -> Request:
        request = self._new_request(text)
        request.logits_from, request.owner = logits_from, job
        return request

    def _compute(self, begun: Request) -> None:
        """Compute the keys and values of the prompt; the request keeps its blocks."""
        with uninterrupted(), self._lock:
            self._scheduler.submit(begun)
        while not begun.owner.ready:
            self._step()

    def _submit(self, requests: Sequence[Request], begun: Request | None) -> None:
        """Put all completions into the queue, with the blocks of the prompt."""
        blocks = self._scheduler.blocks
        with uninterrupted(), self._lock:
            for request in requests:
                if begun is not None and begun.seq is not None:
                    request.seq = int(blocks.allocator.fork([begun.seq])[0])
                    request.computed = len(begun.prompt)
                self._scheduler.submit(request)
            if begun is not None:
                blocks.close(begun)  # the completions hold its blocks now

    def _give_back(self, requests: Sequence[Request]) -> None:
        """End what has not ended, and give back what is held after the end."""
        with uninterrupted(), self._lock:
            for request in requests:
                self._scheduler.finish(request)
                self._scheduler.blocks.close(request)
