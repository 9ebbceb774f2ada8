"""Ctrl-C, and other signals whose handlers raise, at a moment when they do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

PATIENCE = 0.05  # seconds between looks for a signal while a lock is not free

# Signals that programs give handlers which raise: to stop, or because time is up.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if hasattr(signal, name)
)

Handler = Callable[[int, FrameType | None], Any]


class Shield:
    """Handles signals at once only while it is `open`; yielded by `uninterrupted`.

    A handler that raises closes it: what cleans up after the first Ctrl-C is safe from the next.

    Args:
        handlers: by signal.
    """

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self.open = False
        self._handlers = handlers
        self._received: dict[int, FrameType | None] = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals inside the block."""
        if self.open:
            self.open = False
            self._handlers[number](number, frame)
            self.open = True
        else:
            self._received[number] = frame

    def release(self) -> None:
        """Handle what came meanwhile: all of it, whatever the handlers raise."""
        if self._received:
            number, frame = self._received.popitem()
            try:
                self._handlers[number](number, frame)
            finally:
                self.release()

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
    """Signals are handled after the block. Python handles them in the main thread only."""
    handlers: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    shield = Shield(handlers)
    try:
        _handle(dict.fromkeys(handlers, shield.receive))
        yield shield
    finally:
        try:
            _handle(handlers)
        except BaseException:  # of a handler that was set, while others were not
            _handle(handlers)
            raise
        finally:
            shield.release()


def _handle(handlers: dict[int, Handler]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
