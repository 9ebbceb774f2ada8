"""What the engine knows of a request besides its tokens: `Sample`, `ScoreJob`, and the user's
`Handle`.

Read first: sampling.py, request.py. Read next: loop.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from pykvcache.batch import Int64Array
from pykvcache.engine.config import ConfigRules
from pykvcache.engine.delivery import Listener
from pykvcache.engine.distinct import Distinct
from pykvcache.engine.request import Request
from pykvcache.engine.rules import RowRules
from pykvcache.engine.sampling import Event, LogProbs, Output, Sampling, Score


class Sample:
    """One sample of one prompt on its way.

    Attributes:
        listener: called with every event, or None.
        watched: somebody wants its events.
        begun: it has its first token.
        distinct: tokens of its text, once a repetition penalty has asked.
        ruled: processors for what the generation config wants, and that.
        output: set when it ends.
    """

    def __init__(
        self,
        handle: Handle,
        request: Request,
        setting: Sampling,
        prompt_index: int,
        sample_index: int,
        listener: Listener | None,
        watched: bool = False,
    ) -> None:
        self.handle, self.request, self.setting = handle, request, setting
        self.prompt_index, self.sample_index = prompt_index, sample_index
        self.listener, self.watched = listener, watched or listener is not None
        self.begun = False
        self.logprobs: list[LogProbs] | None = None if setting.logprobs is None else []
        self.submitted = time.perf_counter()
        self.first_token = 0.0
        self.error: Exception | None = None
        self.distinct: Distinct | None = None
        self.ruled: tuple[ConfigRules, RowRules] | None = None
        self.output: Output | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether nobody has to look at its tokens as they come."""
        setting = self.setting
        return not self.watched and not setting.stop_sequences and setting.logprobs is None

    def stops(self, tokens: Int64Array) -> bool:
        """Whether the output, whose last tokens these are, ends with one of the stop sequences."""
        return any(
            len(tokens) >= len(stop) and tokens[-len(stop) :].tolist() == list(stop)
            for stop in self.setting.stop_sequences
        )

    def end(self, tokens: Int64Array, reason: str) -> Output:
        """Make the output from prompt and output tokens."""
        now, request = time.perf_counter(), self.request
        self.output = Output(
            self.prompt_index,
            self.sample_index,
            tokens[len(request.prompt) :].tolist(),
            self.logprobs,
            reason,
            len(request.prompt),
            min(request.cached, len(request.prompt)),
            request.preemptions,
            min(request.placed or now, self.first_token or now) - self.submitted,
            (self.first_token or now) - self.submitted,
            now - self.submitted,
            self.error,
        )
        return self.output


class ScoreJob:
    """A completion, whose tokens are known."""

    def __init__(self, completion: Int64Array, top_k: int) -> None:
        self.completion, self.top_k = completion, top_k
        self.score = Score([])
        self.error: Exception | None = None


class Call:
    """What the handles of one call of the engine have in common.

    Attributes:
        ended: samples that have ended.
        streams: somebody takes the events.
        events: those that were not taken yet.
    """

    def __init__(self, streams: bool = False) -> None:
        self.ended, self.streams = 0, streams
        self.events: deque[Event] = deque()


class Stream:
    """Iterates over the events of a call, running the engine as needed.

    `close`, leaving a loop over it early, or dropping it cancels what has not ended; after a drop
    the blocks are back when the engine is used next.
    """

    _total = 0  # samples; set last, an interrupt may come before

    def __init__(self, engine: _Engine, handles: list[Handle], call: Call) -> None:
        self._engine, self._handles, self._call = engine, handles, call
        self._total = sum(len(handle.samples) for handle in handles)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        call = self._call
        while not call.events and call.ended < self._total:
            try:
                self._engine._advance(())
            except BaseException:
                self.close()
                raise
        if not call.events:
            raise StopIteration
        event = call.events.popleft()
        if event.output is not None:
            raise_errors([event.output])
        return event

    def close(self) -> None:
        """Cancel what has not ended."""
        self._engine._cancel(self._handles, ())

    def __del__(self) -> None:
        # The garbage collector may come here from anywhere, also from inside a step.
        if self._total and self._call.ended < self._total:
            self._engine._drop(self._handles)


def raise_errors(outputs: Iterable[Output]) -> None:
    """Raise the first error among outputs."""
    for output in outputs:
        if output.error is not None:
            raise output.error


class _Engine(Protocol):
    def _advance(self, own: Sequence[Handle] | None) -> list[Event]: ...

    def _cancel(self, handles: Sequence[Handle], own: Sequence[Handle] | None) -> None: ...

    def _drop(self, handles: Sequence[Handle]) -> None: ...


class Handle:
    """A prompt that was submitted, with all its samples."""

    def __init__(self, engine: _Engine, call: Call) -> None:
        self._engine, self._call = engine, call
        self._ended = 0
        self.error: Exception | None = None  # of its callback, when others ran the engine
        self.samples: list[Sample] = []
        self.distinct: Int64Array | None = None  # tokens of the prompt, once asked for

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self._ended == len(self.samples)

    @property
    def outputs(self) -> list[Output]:
        """Of the samples that have ended."""
        return [sample.output for sample in self.samples if sample.output is not None]

    def cancel(self) -> None:
        """End what has not ended; all its blocks are given back before any callback is called.

        By a processor, or a hook of the model: when the step that runs is over.
        """
        self._engine._cancel([self], None)

    def result(self) -> list[Output]:
        """Run the engine until this is done; one output a sample.

        Raises:
            Exception: what a processor or the callback of this request raised; not what a callback
                raises that another thread still runs.
        """
        while not self.done:
            self._engine._advance([self])
        raise_errors(self.outputs)
        if self.error is not None:
            raise self.error
        return self.outputs

    def sample_ended(self) -> None:
        """Used by the engine."""
        self._ended += 1
        self._call.ended += 1

    def put_event(self, event: Event) -> None:
        """Used by the engine: keeps the event if somebody will take it."""
        if self._call.streams:
            self._call.events.append(event)
