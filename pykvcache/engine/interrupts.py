"""Ctrl-C at a moment when it does no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PATIENCE = 0.05  # seconds between looks for a signal while a lock is not free


class Shield:
    """Handles SIGINT at once only while it is `open`; yielded by `uninterrupted`.

    A handler that raises closes it: what cleans up after the first Ctrl-C is safe from the next.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any] | None) -> None:
        self.open = False
        self._handler = handler
        self._received: tuple[int, FrameType | None] | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signal inside the block."""
        if self.open and self._handler is not None:
            self.open = False
            self._handler(number, frame)
            self.open = True
        else:
            self._received = (number, frame)

    def release(self) -> None:
        """Handle what came meanwhile."""
        received, self._received = self._received, None
        if received is not None and self._handler is not None:
            self._handler(*received)

    @contextlib.contextmanager
    def holding(self, lock: threading.RLock) -> Iterator[None]:
        """Hold a lock; what comes while others still hold it is handled at once."""
        while not lock.acquire(timeout=PATIENCE):
            self.release()
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def uninterrupted() -> Iterator[Shield]:
    """SIGINT is handled after the block. Python handles signals in the main thread only."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Shield(None)
        return
    shield = Shield(handler)
    signal.signal(signal.SIGINT, shield.receive)
    try:
        yield shield
    finally:
        signal.signal(signal.SIGINT, handler)
        shield.release()
