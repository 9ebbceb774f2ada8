"""The blocks of requests: taken on admission, found again by prefix, shared by equal prompts.

`RequestBlocks` stands between the scheduler, which counts tokens, and the allocator. It knows three
ways for a request to have keys and values without computing them: cached blocks of the same prefix,
the blocks of a running request with the same prompt, and blocks that were swapped out.

Read first: request.py. Read next: scheduler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pykvcache.allocator import BlockAllocator
from pykvcache.batch import Int64Array
from pykvcache.engine.request import Request, TwinKey


@dataclass
class Twins:
    """Requests with one prompt: the first computes it, the others wait and then share it."""

    leader: Request | None = None
    waiting: dict[int, Request] = field(default_factory=dict)  # by order


class RequestBlocks:
    """Gives blocks to requests and takes them back.

    Args:
        allocator: of the pool.
        windows, chunks: what each layer group sees of the past, 0 = all positions.
        prefix_cache: find prefixes of earlier requests; the allocator must have an index.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        windows: Sequence[int] = (0,),
        chunks: Sequence[int] = (0,),
        prefix_cache: bool = False,
    ) -> None:
        self.allocator, self.prefix_cache = allocator, prefix_cache
        self.windows, self.chunks = list(windows), list(chunks)
        self._reaches = [window or chunk for window, chunk in zip(windows, chunks, strict=True)]
        self.epoch = 0  # how often the weights have changed
        self.holders: dict[int, Request] = {}  # waiting with blocks of a shared prompt, by order
        self._twins: dict[TwinKey, Twins] = {}

    @property
    def groups(self) -> int:
        """Layer groups; a sequence has a block table for each."""
        return len(self._reaches)

    def needed(self, tokens: int) -> int:
        """Blocks of one sequence of `tokens` tokens, all groups; those out of windows are gone."""
        size = self.allocator.block_size
        whole = -(-tokens // size)
        return sum(min(whole, -(-w // size) + 1) if w else whole for w in self._reaches)

    def growth(self, tokens: int, more: int) -> int:
        """New blocks when a sequence of `tokens` grows by `more`, if nothing leaves a window."""
        size = self.allocator.block_size
        return self.groups * (-(-(tokens + more) // size) - -(-tokens // size))

    def enqueue(self, request: Request) -> None:
        """The request begins to wait; it may have blocks already, shared with others."""
        if request.seq is not None:
            self.holders[request.order] = request
        self._twins_of(request).waiting[request.order] = request

    def may_open(self, request: Request) -> bool:
        """Whether to admit it now; not while another request computes the same prompt."""
        if request.seq is not None or len(request.tokens) > len(request.prompt):
            return True
        leader = self._twins_of(request).leader
        return leader is None or leader is request

    def open(self, request: Request) -> None:
        """Give the request a sequence and set what of it is computed; takes no new blocks."""
        self.holders.pop(request.order, None)
        if request.seq is None:
            tokens = request.tokens
            end = len(tokens) - 1  # at least one token is computed
            if request.logits_from >= 0:
                end = min(end, request.logits_from)
            request.seq, request.computed = self.start(request, tokens[:end])
            request.epoch = self.epoch
        twins = self._twins_of(request)
        twins.waiting.pop(request.order, None)
        if request.computed < len(request.tokens) == len(request.prompt) and twins.leader is None:
            twins.leader = request

    def start(self, request: Request, tokens: Int64Array) -> tuple[int, int]:
        """A new sequence for a request, and how many of these tokens are in its blocks already."""
        if not self.prefix_cache:
            return int(self.allocator.allocate([0])[0]), 0
        seqs, hits = self.allocator.allocate_cached([tokens], request.salt)
        if request.priority:
            self.allocator.set_priority(seqs, max(-128, min(request.priority, 127)))
        return int(seqs[0]), int(hits[0])

    def prompt_computed(self, request: Request) -> list[Request]:
        """Hand the blocks of a finished prompt to the requests that wait for it; returns those."""
        twins = self._twins.get(_key(request))
        if twins is None or twins.leader is not request:
            return []
        twins.leader = None
        heirs = [twin for twin in twins.waiting.values() if twin.seq is None and not twin.swapped]
        if heirs:
            assert request.seq is not None
            forks = self.allocator.fork([request.seq], len(heirs))
            for heir, seq in zip(heirs, forks.tolist(), strict=True):
                heir.seq, heir.computed, heir.heir_of = seq, len(request.prompt), request
                heir.cached = heir.computed
                heir.epoch = request.epoch
                self.holders[heir.order] = heir
        twins.waiting.clear()
        self._forget_empty(request)
        return heirs

    def forget(self) -> None:
        """The weights have changed: nothing that was computed or is being computed is shared."""
        self.epoch += 1
        if self.prefix_cache:
            self.allocator.forget_prefixes()
        for twins in self._twins.values():
            twins.leader = None

    def hold(self, request: Request) -> None:
        """A request that is done keeps its blocks until `close`, or until others need them."""
        self.holders[request.order] = request

    def record(self, seqs: Int64Array, tokens: Int64Array, counts: Int64Array) -> None:
        """Keys and values of these tokens, row by row, are now in blocks: others may find them."""
        if self.prefix_cache:
            self.allocator.record(seqs, tokens, counts)

    def close(self, request: Request) -> None:
        """Give the blocks back; the request may be opened again."""
        self.holders.pop(request.order, None)
        twins = self._twins_of(request)
        if twins.leader is request:
            twins.leader = None
        if request.seq is not None:
            self.allocator.free([request.seq])
            request.seq = None
        request.computed = 0
        if len(request.tokens) == len(request.prompt) and not request.done:
            twins.waiting[request.order] = request
        self._forget_empty(request)

    def discard(self, request: Request) -> None:
        """As `close`, after a step that failed: its last block may not hold what was recorded."""
        if request.seq is not None:
            self.allocator.truncate([request.seq], [0])
        self.close(request)

    def leave(self, request: Request) -> None:
        """The request ends: give everything back."""
        self.close(request)
        if (twins := self._twins.get(_key(request))) is not None:
            twins.waiting.pop(request.order, None)
            self._forget_empty(request)

    def _twins_of(self, request: Request) -> Twins:
        return self._twins.setdefault(_key(request), Twins())

    def _forget_empty(self, request: Request) -> None:
        key = _key(request)
        twins = self._twins.get(key)
        if twins is not None and twins.leader is None and not twins.waiting:
            del self._twins[key]


def _key(request: Request) -> TwinKey:
    if request.twin_key is None:
        alone = request.logits_from >= 0  # its logits are not those of the last prompt token
        request.twin_key = (request.salt, request.order if alone else request.prompt.tobytes())
    return request.twin_key
