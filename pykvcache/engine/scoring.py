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
        for job in jobs:
            job.request = self._new_request(np.concatenate([prompt, job.completion[:-1]]))
            job.request.logits_from, job.request.owner = len(prompt) - 1, job
            self._scheduler.check(job.request)
        begun = None
        try:
            if len(prompt) > 1 and jobs:
                begun = self._compute(prompt[:-1])
            with self._lock:
                for job in jobs:
                    self._submit(job.request, begun)
                if begun is not None:
                    self._scheduler.blocks.close(begun)  # the completions hold its blocks now
            while not all(job.request.done for job in jobs):
                self._step()
        finally:
            with self._lock:
                for job in jobs:
                    self._scheduler.finish(job.request)
                if begun is not None:
                    self._scheduler.blocks.close(begun)
        return [job.score for job in jobs]

    def _submit(self, request: Request, begun: Request | None) -> None:
        """Put a completion into the queue, with the blocks of the prompt."""
        blocks = self._scheduler.blocks
        if begun is not None and begun.seq is not None:
            request.seq = int(blocks.allocator.fork([begun.seq])[0])
            request.computed = len(begun.prompt)
        self._scheduler.submit(request)

    def _compute(self, text: Int64Array) -> Request:
        """Compute the keys and values of a text; the request keeps its blocks."""
        request = self._new_request(text)
        request.logits_from = NO_LOGITS
        request.owner = job = ScoreJob(text, 0, keep=True)
        job.request = request
        with self._lock:
            self._scheduler.submit(request)
        try:
            while not job.ready:
                self._step()
        except BaseException:
            with self._lock:
                self._scheduler.finish(request)
            raise
        return request
