"""Requests that wait: those that were preempted, then the trace in its order.

Only the head of the trace is held, so a queue takes no more memory for a longer trace.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pykvcache.bench.traces import Request


@dataclass(slots=True)
class Job:
    """A request as the replay sees it.

    The token that a step samples enters the cache in the next step, so the last one never does:
    `final` = prompt + output - 1. `prefill` is what has to be computed at admission: the prompt, or
    after a preemption the prompt and every token generated so far. `prefix` is the trace's.
    """

    prompt: int
    output: int
    final: int
    prefill: int
    prefix: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request) -> Job:
        final = request.prompt + request.output - 1
        return cls(request.prompt, request.output, final, request.prompt, request.prefix)


class Queue:
    """First come, first served; preempted jobs go to the front.

    Args:
        requests: in order of arrival.
        holds: whether a job could be served if it were alone; others are refused.
        saturated: every request is there from the start. Otherwise `arrival` says when.
    """

    def __init__(
        self, requests: Iterable[Request], holds: Callable[[Job], bool], saturated: bool
    ) -> None:
        self._requests = iter(requests)
        self._holds = holds
        self._saturated = saturated
        self._preempted: deque[Job] = deque()
        self._next: Job | None = None
        self._start: float | None = None
        self.next_arrival = math.inf
        self.refused = self._count = 0
        self._read()

    def head(self, clock: float) -> Job | None:
        """The job that is next, if it has arrived."""
        if self._preempted:
            return self._preempted[0]
        return self._next if self.next_arrival <= clock else None

    def pop(self) -> Job:
        """Take the head."""
        if self._preempted:
            return self._preempted.popleft()
        job = self._next
        assert job is not None
        self._read()
        return job

    def push_front(self, job: Job) -> None:
        """Put back a job that was preempted."""
        self._preempted.appendleft(job)

    def _time_of(self, request: Request) -> float:
        """Seconds since the first arrival."""
        assert request.arrival is not None
        if self._start is None:
            self._start, self.next_arrival = request.arrival, 0.0
        time = request.arrival - self._start
        if time < self.next_arrival:
            raise ValueError(f"request {self._count} arrives before the one in front of it")
        return time

    def _read(self) -> None:
        for request in self._requests:
            self._count += 1
            job = Job.of(request)
            if self._holds(job):
                self._next = job
                self.next_arrival = 0.0 if self._saturated else self._time_of(request)
                return
            self.refused += 1
        self._next, self.next_arrival = None, math.inf
