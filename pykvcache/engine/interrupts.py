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
NAMES = (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGXCPU", "SIGUSR1",
    "SIGUSR2", "SIGBREAK",
)  # fmt: skip
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], Any]


class Shield:
    """Handles signals at once only while it is `open`; yielded by `uninterrupted`.

    A handler that raises closes it: what cleans up after the first Ctrl-C is safe from the next.

    Args:
        handlers: by signal.

    Attributes:
        raised: what the newest handler that raised has raised.
    """

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self.open = False
        self.raised: BaseException | None = None
        self._handlers = handlers
        self._received: dict[int, FrameType | None] = {}

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals inside the block."""
        if self.open:
            self.open = False
            self._call(number, frame)
            self.release()  # what came while that handler ran
            self.open = True
        else:
            self._received[number] = frame

    def release(self) -> None:
        """Handle what came meanwhile: all of it, whatever the handlers raise."""
        if self._received:
            number, frame = self._received.popitem()
            try:
                self._call(number, frame)
            finally:
                self.release()

    def _call(self, number: int, frame: FrameType | None) -> None:
        try:
            self._handlers[number](number, frame)
        except BaseException as error:
            self.raised = error
            raise

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
        for number in handlers:
            signal.signal(number, shield.receive)
        yield shield
    finally:
        try:
            _restore(handlers, shield)
        finally:
            shield.release()


def _restore(handlers: dict[int, Handler], shield: Shield) -> None:
    """Set the handlers again, whatever those raise that are set already.

    One that was replaced inside the block stays.
    """
    raised: BaseException | None = None
    done = False
    while not done:
        try:
            for number, handler in handlers.items():
                if signal.getsignal(number) == shield.receive:
                    signal.signal(number, handler)
            done = True
        except BaseException as error:
            raised = raised or error
    if raised is not None:
        raise raised
