"""Requests that wait: those that were preempted, then the trace in its order.

No more than LOOKAHEAD requests of the trace are held, so a longer trace takes no more memory.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pykvcache.bench.traces import Request

LOOKAHEAD = 256


@dataclass(slots=True)
class Job:
    """A request as the replay sees it.

    The token that a step samples enters the cache in the next step, so the last one never does:
    `final` = prompt + output - 1. `prefill` is what has to be computed at admission: the prompt, or
    after a preemption the prompt and every token generated so far. `prefix` is the trace's; a
    `swapped` job computes nothing, its `prefill` tokens come back from elsewhere.
    """

    prompt: int
    output: int
    final: int
    prefill: int
    prefix: tuple[int, ...] = ()
    swapped: bool = False

    @classmethod
    def of(cls, request: Request) -> Job:
        final = request.prompt + request.output - 1
        return cls(request.prompt, request.output, final, request.prompt, request.prefix)


class Queue:
    """Requests in their order; preempted ones come first.

    Args:
        requests: in order of arrival.
        holds: whether a job could be served if it were alone; others are refused.
        saturated: every request is there from the start. Otherwise `arrival` says when.
        order: "fcfs", first come first served, or "shortest", the shortest prompt of the first
            LOOKAHEAD that have arrived.

    Raises:
        ValueError: arrivals matter and go back.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        holds: Callable[[Job], bool],
        saturated: bool,
        order: str = "fcfs",
    ) -> None:
        self._requests = iter(requests)
        self._holds = holds
        self._saturated = saturated
        self._lookahead = 1 if order == "fcfs" else LOOKAHEAD
        self._arrived: list[tuple[int, int, Job]] = []  # heap of (prompt, number, job)
        self._preempted: deque[Job] = deque()
        self._next: Job | None = None
        self._next_time = 0.0
        self._start: float | None = None
        self.refused = self._count = 0
        self._read()

    @property
    def next_arrival(self) -> float:
        """When there is a request: 0 if one waits, infinity if none will come."""
        if self._arrived or self._preempted:
            return 0.0
        return self._next_time

    def next_change(self) -> float:
        """When an arrival may make another request the head; infinity if none can."""
        is_full = len(self._arrived) >= self._lookahead
        return math.inf if self._preempted or is_full else self._next_time

    def head(self, clock: float) -> Job | None:
        """The job that is next, if it has arrived."""
        if self._preempted:
            return self._preempted[0]
        while self._next_time <= clock and len(self._arrived) < self._lookahead:
            assert self._next is not None
            heapq.heappush(self._arrived, (self._next.prompt, self._count, self._next))
            self._read()
        return self._arrived[0][2] if self._arrived else None

    def pop(self) -> Job:
        """Take what head() returned."""
        return self._preempted.popleft() if self._preempted else heapq.heappop(self._arrived)[2]

    def push_front(self, job: Job) -> None:
        """Put back a job that was preempted."""
        self._preempted.appendleft(job)

    def _read(self) -> None:
        for request in self._requests:
            self._count += 1
            job = Job.of(request)
            if self._holds(job):
                self._next_time = 0.0 if self._saturated else self._time_of(request)
                self._next = job
                return
            self.refused += 1
        self._next, self._next_time = None, math.inf

    def _time_of(self, request: Request) -> float:
        """Seconds since the first arrival."""
        assert request.arrival is not None
        if self._start is None:
            self._start = request.arrival
        time = request.arrival - self._start
        if time < self._next_time:
            raise ValueError(f"request {self._count} arrives before the one in front of it")
        return time
