"""A request while the engine has it, and `Lanes`: the running ones as arrays.

A step touches arrays only; `Request` objects are looked at when one starts, is preempted, or ends.

Read first: sampling.py, tokens.py. Read next: family.py, scheduler.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pykvcache.batch import Int64Array
from pykvcache.engine.tokens import TokenTable

if TYPE_CHECKING:
    from pykvcache.engine.family import Family
    from pykvcache.engine.swap import Swapped

NO_TOKENS = np.empty(0, np.int64)
BoolArray = NDArray[np.bool_]


@dataclass(eq=False)
class Request:
    """One sample of one prompt.

    Attributes:
        prompt: int64 token ids, one array for all samples.
        limit: tokens, prompt included, at which it ends.
        key: place in the queue, smallest first.
        order: number of the request, to break ties.
        logits_from: first position whose logits are wanted; -1: that of the newest token.
        salt: requests of different salts share no cached prefix.
        priority: larger is served earlier and its cached blocks are kept longer.
        output: int64 token ids after the prompt, as long as it is not in a lane.
        computed: tokens whose keys and values are in blocks.
        seq: handle of those blocks; None: it has none.
        epoch: of the weights that began to fill them, see blocks.py.
        swapped: copy of its blocks in host memory, instead of them, see swap.py.
        lane: where it runs; -1: it waits.
        plain: its next token is the most likely one, and nobody needs to hear of it.
        ends_at_eos: an end-of-text token ends it.
        owner: what the engine knows of it.
        family: those that begin with the same tokens, see blocks.py.
    """

    prompt: Int64Array
    limit: int
    key: int
    order: int
    logits_from: int = -1
    salt: int = 0
    priority: int = 0
    output: Int64Array = field(default_factory=lambda: NO_TOKENS)
    computed: int = 0
    seq: int | None = None
    epoch: int = 0
    swapped: Swapped | None = None
    lane: int = -1
    cached: int = 0
    preemptions: int = 0
    done: bool = False
    plain: bool = False
    ends_at_eos: bool = True
    owner: Any = None
    family: Family | None = None
    placed: float = 0.0  # when it first got a lane, time.perf_counter()
    token_time: float = np.nan  # when its newest token came, as long as it is not in a lane
    room_needed: int = 0  # free blocks for which it was too much when its prefix was looked up,
    retry_at: int = 0  # and the step that looks again, since more of it may be there

    @property
    def length(self) -> int:
        """Tokens of prompt and output, as long as it is not in a lane."""
        return len(self.prompt) + len(self.output)

    @property
    def tokens(self) -> Int64Array:
        """Prompt and output, as long as it is not in a lane; only the output is kept for it."""
        if not len(self.output):
            return self.prompt
        return np.concatenate([self.prompt, self.output])

    @tokens.setter
    def tokens(self, tokens: Int64Array) -> None:
        self.output = tokens[len(self.prompt) :].copy()


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
        token_time: when the newest generated token came, time.perf_counter(); nan: there is none.
        plain, ends_at_eos: as of the request.
        tokens: the known ones of each.
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
        self.token_time = np.zeros(count)
        self.plain, self.ends_at_eos = np.zeros(count, bool), np.zeros(count, bool)
        self.tokens = TokenTable(count)
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
        tokens = request.tokens
        self.tokens.set(self._free[-1], tokens)
        lane = self._free.pop()
        request.placed = request.placed or time.perf_counter()
        self.requests[lane], request.lane, self._used[lane] = request, lane, True
        self.seqs[lane], self.computed[lane] = request.seq, request.computed
        self.known[lane], self.limit[lane] = len(tokens), request.limit
        self.logits_from[lane], self.key[lane] = request.logits_from, request.key
        self.plain[lane], self.ends_at_eos[lane] = request.plain, request.ends_at_eos
        self.last_step[lane], self.token_time[lane] = -1, request.token_time
        if request.family is not None:
            request.family.running += 1
        self._active = None
        return lane

    def remove(self, lane: int) -> Request:
        """Take the request out of its lane; what the arrays know goes back into it."""
        request = self.requests[lane]
        assert request is not None
        output = self.tokens[lane, len(request.prompt) : self.known[lane]]
        request.output = output.astype(np.int64)
        request.computed = int(self.computed[lane])
        request.token_time = float(self.token_time[lane])
        if request.family is not None:
            request.family.running -= 1
        self.tokens.clear(lane)
        request.lane, self.requests[lane], self._used[lane] = -1, None, False
        self._free.append(lane)
        self._active = None
        return request

    def ids(self, lanes: Int64Array, starts: Int64Array, counts: Int64Array) -> Int64Array:
        """Tokens [sum(counts)] of the lanes from positions `starts` on, row by row."""
        if len(counts) == counts.sum():  # one each
            return self.tokens.take(lanes, starts)
        return self.tokens.take(np.repeat(lanes, counts), ranges(starts, counts))

    def append(self, lanes: Int64Array, tokens: Int64Array) -> None:
        """Add one new token to each of the lanes."""
        known = self.known[lanes]
        self.tokens.widen(lanes, known + 1)
        self.tokens.put(lanes, known, tokens)
        self.known[lanes] = known + 1

    def skip(self, lanes: Int64Array, count: int) -> None:
        """As `append`, `count` times, for tokens that nobody will look at."""
        self.tokens.widen(lanes, self.known[lanes] + count)
        self.known[lanes] += count
        self.computed[lanes] += count


def ranges(starts: Int64Array, counts: Int64Array) -> Int64Array:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then starts[1], ...: [sum(counts)]."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    steps: Int64Array = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return steps
