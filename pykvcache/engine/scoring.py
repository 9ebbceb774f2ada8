"""Log-probabilities of completions: `Scorer`, which `Engine.score` runs.

Every completion is a request that wants the logits of its own positions. They are one family: the
first computes the prompt but its last token, and the others go on from these blocks.

Read first: handle.py, family.py, scheduler.py. Read next: engine.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pykvcache.batch import Int64Array
from pykvcache.engine.family import Family
from pykvcache.engine.handle import ScoreJob
from pykvcache.engine.interrupts import uninterrupted
from pykvcache.engine.request import Request
from pykvcache.engine.sampling import Score
from pykvcache.engine.scheduler import Scheduler


class Scorer:
    """Scores completions of one prompt.

    Args:
        scheduler: of the engine, used under `lock`.
        lock: of the engine.
        step: runs one step of the engine.
        new_request: makes a request of a prompt and `new_tokens`; raises ValueError if that is too
            long.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lock: threading.RLock,
        step: Callable[[], object],
        new_request: Callable[..., Request],
    ) -> None:
        self._scheduler, self._lock, self._step = scheduler, lock, step
        self._new_request = new_request

    def score(
        self, prompt: Int64Array, completions: Sequence[Int64Array], top_k: int
    ) -> list[Score]:
        """One score for each completion; nothing is left behind, whatever happens.

        Raises:
            ValueError: one of them could never fit, and nothing was started; or the vocabulary has
                shrunk meanwhile and lacks one of their tokens.
        """
        jobs = [ScoreJob(completion, top_k) for completion in completions]
        family = Family(None, len(prompt) - 1)
        requests = [self._request(prompt, job, family) for job in jobs]
        for request in requests:
            self._scheduler.check(request)
        with uninterrupted() as shield:
            try:
                shield.open = True
                with uninterrupted(), self._lock:
                    for request in requests:
                        self._scheduler.submit(request)
                while not all(request.done for request in requests):
                    self._step()
            finally:
                shield.open = False
                self._give_back(requests)
        for job in jobs:
            if job.error is not None:
                raise job.error
        return [job.score for job in jobs]

    def _request(self, prompt: Int64Array, job: ScoreJob, family: Family) -> Request:
        """A request that has its output already; the last token needs no logits after it."""
        request = self._new_request(prompt, new_tokens=len(job.completion))
        request.output = job.completion[:-1]
        request.logits_from, request.family, request.owner = len(prompt) - 1, family, job
        return request

    def _give_back(self, requests: Sequence[Request]) -> None:
        """End what has not ended."""
        with uninterrupted(), self._lock:
            for request in requests:
                self._scheduler.finish(request)
