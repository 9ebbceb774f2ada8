"""Events on their way to callbacks.

Events are queued while the engine is locked, in the order in which they happen, and delivered when
it is not, by one thread at a time. So a callback may run the engine, cancel or submit: what it
causes is delivered after it has returned.

Read first: sampling.py, interrupts.py. Read next: handle.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from pykvcache.engine.interrupts import Shield
from pykvcache.engine.sampling import Event

Owner = TypeVar("Owner")
Listener = Callable[[Event], None]


class Delivery(Generic[Owner]):
    """The queue of an engine's events that have a listener, with whose listener it is."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Event, Listener, Owner]] = deque()
        self._lock = threading.Lock()  # of `_delivering`
        self._delivering = False

    def put(self, event: Event, listener: Listener, owner: Owner) -> None:
        """The event has happened; the engine is locked."""
        self._queue.append((event, listener, owner))

    def deliver(self, shield: Shield, note: Callable[[Owner, Exception], object]) -> None:
        """Call the listeners of all events, also after one has raised; the engine is not locked.

        Does nothing inside of a callback or while another thread delivers: that one goes on with
        what was queued meanwhile. Ctrl-C comes through in callbacks and waits elsewhere.

        Args:
            note: told whose listener has raised what.

        Raises:
            BaseException: the first interrupt that came out of a listener, or the first that the
                handler of a signal has raised while one ran.
        """
        interrupt: BaseException | None = None
        delivered = self._next(True)
        while delivered is not None:
            event, listener, owner = delivered
            try:
                shield.open = True
                listener(event)
                shield.open = False
            except BaseException as raised:
                shield.open = False
                if isinstance(raised, Exception) and raised is not shield.raised:
                    note(owner, raised)
                else:
                    interrupt = interrupt or raised
            delivered = self._next(False)
        if interrupt is not None:
            raise interrupt

    def _next(self, begin: bool) -> tuple[Event, Listener, Owner] | None:
        """The next event for this thread, which is about to `begin` or delivers already."""
        with self._lock:
            if begin and self._delivering:
                return None
            self._delivering = bool(self._queue)
            return self._queue.popleft() if self._queue else None
