"""A request while the engine has it, and `Lanes`: the running ones as arrays.

A step touches arrays only; `Request` objects are looked at when one starts, is preempted, or ends.

Read first: sampling.py. Read next: scheduler.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pykvcache.batch import Int64Array

TwinKey = tuple[
    int, int | bytes
]  # salt, and the prompt or the number of a request that has no twin
BoolArray = NDArray[np.bool_]


@dataclass(eq=False)
class Request:
    """One sample of one prompt.

    Attributes:
        prompt: int64 token ids.
        limit: tokens, prompt included, at which it ends.
        key: place in the queue, smallest first.
        order: number of the request, to break ties.
        logits_from: first position whose logits are wanted; -1: that of the newest token.
        salt: requests of different salts share no cached prefix.
        priority: larger is served earlier and its cached blocks are kept longer.
        tokens: prompt and output so far, while it is not in a lane.
        computed: tokens whose keys and values are in blocks.
        seq: handle of those blocks; None: it has none.
        epoch: of the weights that began to fill them, see blocks.py.
        swapped: its blocks in host memory, see swap.py.
        lane: where it runs; -1: it waits.
        plain: its next token is the most likely one, and nobody needs to hear of it.
        ends_at_eos: an end-of-text token ends it.
        owner: what the engine knows of it.
    """

    prompt: Int64Array
    limit: int
    key: int
    order: int
    logits_from: int = -1
    salt: int = 0
    priority: int = 0
    tokens: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    computed: int = 0
    seq: int | None = None
    epoch: int = 0
    swapped: Any = None
    lane: int = -1
    cached: int = 0
    preemptions: int = 0
    done: bool = False
    plain: bool = False
    ends_at_eos: bool = True
    owner: Any = None
    heir_of: Request | None = None  # shares the blocks of its prompt, while it waits
    placed: float = 0.0  # when it first got a lane, time.perf_counter()
    twin_key: TwinKey | None = None  # of its prompt, see blocks.py
    room_needed: int = 0  # free blocks for which it was too much when its prefix was looked up,
    retry_at: int = 0  # and the step that looks again, since more of it may be there

    def __post_init__(self) -> None:
        self.tokens = self.prompt


class Lanes:
    """Running requests as arrays: lane i is row i of each.

    Attributes:
        requests: the request in each lane, or None.
        seqs: handles of their blocks.
        computed: tokens whose keys and values are in blocks once the planned step has run.
        known: tokens known, the newest not yet computed.
        limit: tokens at which the request ends.
        logits_from: first position whose logits are wanted, -1 = that of the newest token.
        key: place in the queue.
        last_step: when the lane last took part in a step.
        plain, ends_at_eos: as of the request.
        tokens: int32 [lanes, width], the known tokens of each.
    """

    def __init__(self, count: int) -> None:
        self.requests: list[Request | None] = [None] * count
        self.seqs = np.zeros(count, np.int64)
        self.computed = np.zeros(count, np.int64)
        self.known = np.zeros(count, np.int64)
        self.limit = np.zeros(count, np.int64)
        self.logits_from = np.zeros(count, np.int64)
        self.key = np.zeros(count, np.int64)
        self.last_step = np.zeros(count, np.int64)
        self.plain, self.ends_at_eos = np.zeros(count, bool), np.zeros(count, bool)
        self.tokens = np.empty((count, 0), np.int32)
        self._used = np.zeros(count, bool)
        self._free = list(range(count - 1, -1, -1))
        self._active: Int64Array | None = None

    @property
    def num_free(self) -> int:
        """Lanes that nobody is in."""
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Lanes in use."""
        return len(self.requests) - len(self._free)

    @property
    def active(self) -> Int64Array:
        """Lanes in use, in the order of the queue."""
        if self._active is None:
            used = np.flatnonzero(self._used)
            self._active = used[np.argsort(self.key[used], kind="stable")]
        return self._active

    def place(self, request: Request) -> int:
        """Put a request that has blocks into a free lane."""
        assert request.seq is not None
        self._widen(len(request.tokens) + 1)
        lane = self._free.pop()
        request.placed = request.placed or time.perf_counter()
        self.requests[lane], request.lane, self._used[lane] = request, lane, True
        self.seqs[lane], self.computed[lane] = request.seq, request.computed
        self.known[lane], self.limit[lane] = len(request.tokens), request.limit
        self.logits_from[lane], self.key[lane] = request.logits_from, request.key
        self.plain[lane], self.ends_at_eos[lane] = request.plain, request.ends_at_eos
        self.last_step[lane] = -1
        self.tokens[lane, : len(request.tokens)] = request.tokens
        self._active = None
        return lane

    def remove(self, lane: int) -> Request:
        """Take the request out of its lane; what the arrays know goes back into it."""
        request = self.requests[lane]
        assert request is not None
        request.tokens = self.tokens[lane, : self.known[lane]].astype(np.int64)
        request.computed = int(self.computed[lane])
        request.lane, self.requests[lane], self._used[lane] = -1, None, False
        self._free.append(lane)
        self._active = None
        return request

    def ids(self, lanes: Int64Array, starts: Int64Array, counts: Int64Array) -> Int64Array:
        """Tokens [sum(counts)] of the lanes from positions `starts` on, row by row."""
        if len(counts) == counts.sum():  # one each
            return self.tokens[lanes, starts].astype(np.int64)
        positions = ranges(starts, counts)
        return self.tokens[np.repeat(lanes, counts), positions].astype(np.int64)

    def append(self, lanes: Int64Array, tokens: Int64Array) -> None:
        """Add one new token to each of the lanes."""
        self._widen(int(self.known[lanes].max(initial=0)) + 1)
        self.tokens[lanes, self.known[lanes]] = tokens
        self.known[lanes] += 1

    def skip(self, lanes: Int64Array, count: int) -> None:
        """As `append`, `count` times, for tokens that nobody will look at."""
        self._widen(int(self.known[lanes].max(initial=0)) + count)
        self.known[lanes] += count
        self.computed[lanes] += count

    def _widen(self, width: int) -> None:
        if width > self.tokens.shape[1]:
            width = max(2 * width, 256)
            wider = np.empty((len(self.requests), width), np.int32)
            wider[:, : self.tokens.shape[1]] = self.tokens
            self.tokens = wider


def ranges(starts: Int64Array, counts: Int64Array) -> Int64Array:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then starts[1], ...: [sum(counts)]."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    steps: Int64Array = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return steps
