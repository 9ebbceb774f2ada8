"""Nothing that other weights have computed is shared: `Freshness`, asked before that happens.

Read first: guard.py, scheduler.py. Read next: engine.py.
"""

from __future__ import annotations

from typing import Any

from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.guard import WeightsGuard
from pykvcache.engine.request import Request
from pykvcache.engine.runner import ModelRunner
from pykvcache.engine.scheduler import Scheduler


class Freshness:
    """Looks at the weights before every step, and closely before blocks are shared.

    Args:
        guard: of the model.
        blocks, runner: forget what other weights have computed, and graphs that read them.
    """

    def __init__(self, guard: WeightsGuard, blocks: RequestBlocks, runner: ModelRunner) -> None:
        self._guard, self._blocks, self._runner = guard, blocks, runner
        self._compared = False  # values, in this step

    def begin(self, thorough: bool) -> None:
        """A step begins; `thorough`: new requests have come."""
        self._compared = False
        if self._guard.changed(thorough):
            self.forget()
        self._compared = thorough

    def is_stale(self) -> bool:
        """Whether the weights turn out to have changed; then everything is forgotten by now.

        Values are compared once a step: that is for steps which share something, not for all.
        """
        if self._compared:
            return False
        changed = self._guard.changed(thorough=True)
        if changed:
            self.forget()
        self._compared = True
        return changed

    def forget(self) -> None:
        """Share nothing that was computed so far, and accept the weights as they are."""
        self._blocks.forget()
        if self._runner.graphs is not None:
            self._runner.graphs.clear()
        self._guard.accept()  # last: after an interrupt the next look begins anew


class FreshScheduler(Scheduler):
    """A scheduler whose requests take blocks of others only while the weights are the same."""

    def __init__(self, freshness: Freshness, *args: Any) -> None:
        super().__init__(*args)
        self._freshness = freshness

    def _start(self, request: Request, room: int, alone: bool) -> bool:
        held = request.seq is not None
        if not super()._start(request, room, alone):
            return False
        if held or not request.computed:
            return True
        try:
            stale = self._freshness.is_stale()
        except BaseException:
            self._withdraw(request)
            raise
        if not stale:
            return True
        self._withdraw(request)
        return super()._start(request, room, alone)

    def _withdraw(self, request: Request) -> None:
        """Undo that a request was placed; it still waits."""
        self.lanes.remove(request.lane)
        self.blocks.close(request)

    def heirs(self, request: Request) -> list[Request]:
        """Requests that share the prompt which this one has computed; none if it is stale."""
        heirs = self.blocks.prompt_computed(request)
        stale = True
        try:
            stale = bool(heirs) and self._freshness.is_stale()
        finally:
            if stale:  # they wait on, without blocks
                for heir in heirs:
                    self.blocks.close(heir)
        return [] if stale else heirs
