"""Requests that wait, in the order in which they are served."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from pykvcache.engine.request import Request

SLACK = 64  # entries of requests that no longer wait


class WaitingQueue:
    """A heap by `key`, then `order`. Requests that left are skipped when they come up."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._waiting: set[Request] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        """The request waits."""
        if request not in self._waiting:
            self._waiting.add(request)
            heapq.heappush(self._heap, (request.key, request.order, request))

    def drop(self, request: Request) -> None:
        """The request no longer waits."""
        self._waiting.discard(request)
        if len(self._heap) > 2 * len(self._waiting) + SLACK:
            self._heap = [entry for entry in self._heap if entry[2] in self._waiting]
            heapq.heapify(self._heap)

    def in_order(self) -> Iterator[Request]:
        """Requests from the first on; those that were not dropped meanwhile go on waiting."""
        passed: list[tuple[int, int, Request]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if entry[2] in self._waiting:
                    passed.append(entry)
                    yield entry[2]
        finally:
            for entry in passed:
                if entry[2] in self._waiting:
                    heapq.heappush(self._heap, entry)
