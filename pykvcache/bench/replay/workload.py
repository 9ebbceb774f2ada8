"""The requests of a replay: a trace, its first so many, and none longer than the maximum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pykvcache.bench.replay.synthetic import DEFAULT_COUNT, SYNTHETIC, check_sigma
from pykvcache.bench.traces import TRACES, Request, read_trace

ALIASES = {"mooncake": "mooncake-conv"}


@dataclass(frozen=True)
class Workload:
    """Requests that can be read again and again; nothing is kept in memory.

    A request has at least one prompt and one output token. What is longer than `max_len` is cut to
    it, the prompt first to max_len - 1 tokens.

    Attributes:
        trace: a name in TRACES or SYNTHETIC, or a file.
        max_len: longest prompt + output, in tokens; None for the longest of the trace.
        limit: number of requests at most; None for all (synthetic: DEFAULT_COUNT).
        seed, sigma: of synthetic requests.
        ordered: whether it is an error that a request of a trace arrives before the one in front.
    """

    trace: str
    max_len: int | None = None
    limit: int | None = None
    seed: int = 0
    sigma: float = 1.0
    ordered: bool = False

    def __iter__(self) -> Iterator[Request]:
        for request in self._read():
            prompt, output = max(1, request.prompt), max(1, request.output)
            if self.max_len is not None and prompt + output > self.max_len:
                prompt = min(prompt, self.max_len - 1)
                output = min(output, self.max_len - prompt)
            yield Request(prompt, output, request.arrival, request.prefix)

    def _read(self) -> Iterator[Request]:
        if self.trace in SYNTHETIC:
            check_sigma(self.sigma)
            lengths = replace(SYNTHETIC[self.trace], sigma=self.sigma)
            return lengths.draw(DEFAULT_COUNT if self.limit is None else self.limit, self.seed)
        if self.trace in ALIASES:
            return islice(read_trace(ALIASES[self.trace], self.ordered), self.limit)
        if self.trace not in TRACES and not Path(self.trace).is_file():
            names = ", ".join([*TRACES, *SYNTHETIC])
            raise ValueError(f"trace must be a file or one of {names}, got {self.trace!r}")
        return islice(read_trace(self.trace, self.ordered), self.limit)


@dataclass(frozen=True)
class Survey:
    """What one pass over a workload finds; raises what reading it raises.

    longest: largest prompt + output. prompt, output: means. cut: requests above max_len.
    """

    count: int
    longest: int
    prompt: float
    output: float
    cut: int
    has_arrivals: bool
    has_prefixes: bool

    @classmethod
    def of(cls, workload: Workload) -> Survey:
        count = longest = prompts = outputs = cut = 0
        has_arrivals, has_prefixes = True, False
        for request in replace(workload, max_len=None):
            count += 1
            length = request.prompt + request.output
            longest = max(longest, length)
            prompts += request.prompt
            outputs += request.output
            cut += workload.max_len is not None and length > workload.max_len
            has_arrivals &= request.arrival is not None
            has_prefixes |= bool(request.prefix)
        if count == 0:
            raise ValueError(f"trace {workload.trace} has no requests")
        return cls(
            count, longest, prompts / count, outputs / count, cut, has_arrivals, has_prefixes
        )
