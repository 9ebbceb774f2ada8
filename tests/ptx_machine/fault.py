"""What a kernel does wrong."""

from __future__ import annotations


class Fault(Exception):
    """An access, a race or an instruction that a GPU would not do, or not reliably."""


class NotHere(Exception):
    """Lanes that an instruction of the whole warp has to wait for; `threads` are those waiting."""

    def __init__(self, threads: object) -> None:
        super().__init__("lanes are missing")
        self.threads = threads


class Stalled(NotHere):
    """Threads that wait for a phase of an mbarrier."""
