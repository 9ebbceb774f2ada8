"""The blocks of requests: taken on admission, found again by prefix, shared by equal prompts.

`RequestBlocks` stands between the scheduler, which counts tokens, and the allocator. It knows three
ways for a request to have keys and values without computing them: cached blocks of the same prefix,
the blocks that its family keeps for all who begin with the same tokens, and blocks that were
swapped out.

Read first: request.py, family.py. Read next: scheduler.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from pykvcache.allocator import BlockAllocator
from pykvcache.batch import Int64Array
from pykvcache.engine.family import Family, PromptKey
from pykvcache.engine.request import Request


class RequestBlocks:
    """Gives blocks to requests and takes them back.

    Args:
        allocator: of the pool.
        windows, chunks: what each layer group sees of the past, 0 = all positions.
        prefix_cache: find prefixes of earlier requests; the allocator must have an index.

    Attributes:
        kept: families whose blocks are kept for their heirs, by rank.
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
        self.kept: list[Family] = []
        self._families: dict[PromptKey, Family] = {}  # those of which somebody waits or leads
        self._newest: Family | None = None  # one of them, most likely that of the next request
        self._rebuilding: dict[Family, None] = {}  # an heir leads: the blocks had to go

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
        """The request begins to wait, as one of its family, or of those with an equal prompt."""
        if request.family is None:
            request.family = self._family_of(request)
        self._wait(request)

    def may_open(self, request: Request) -> bool:
        """Whether to admit it now; not while another request computes what it begins with."""
        if self._has_beginning(request) or self.inherits(request):
            return True
        leader = _family(request).leader
        return leader is None or leader is request

    def inherits(self, request: Request) -> bool:
        """Whether `open` will give it the blocks that its family keeps."""
        family = _family(request)
        return family.seq is not None and request.seq is None and _is_heir(request)

    def copies(self, request: Request) -> int:
        """Blocks that are copied when it goes on from those of its family."""
        partial = _family(request).length % self.allocator.block_size
        return self.groups if partial and self.inherits(request) else 0

    def open(self, request: Request) -> None:
        """Give the request a sequence and set what of it is computed; takes no new blocks."""
        family = _family(request)
        if self.inherits(request):
            assert family.seq is not None
            request.seq = int(self.allocator.fork([family.seq])[0])
            request.computed, request.epoch = family.length, self.epoch
        elif request.seq is None:
            end = request.length - 1  # at least one token is computed
            if request.logits_from >= 0:
                end = min(end, request.logits_from)
            request.seq, request.computed = self._start(request, request.tokens[:end])
            request.epoch = self.epoch

    def join(self, request: Request) -> None:
        """It waits no more; it leads its family if it has to compute what that begins with."""
        family = _family(request)
        family.fresh.pop(request.order, None)
        family.heirs.pop(request.order, None)
        if request.computed < family.length and family.leader is None:
            if not _is_heir(request):
                family.leader = request
            elif family.heirs:
                family.leader = request
                self._rebuilding[family] = None
        self._tidy(family)

    def chunk_end(self, request: Request, known: int) -> int:
        """Where its next chunk has to end: what the others wait for ends there."""
        family = _family(request)
        return min(known, family.length) if family.leader is request else known

    def prompt_computed(self, request: Request) -> list[Request]:
        """Keep the blocks of a finished prompt for the requests that wait for it; returns those."""
        family = request.family
        if family is None or family.leader is not request:
            return []
        family.leader = None
        heirs = list(family.fresh.values())
        family.fresh.clear()
        for heir in heirs:
            family.heirs[heir.order] = heir
            heir.cached = family.length
        self._keep(family, request)
        self._tidy(family)
        return heirs

    def keep_rebuilt(self, computed: Int64Array) -> None:
        """Before a step: keep what heirs have computed again for the others of their families.

        computed: tokens of each lane that are in blocks.
        """
        for family in list(self._rebuilding):
            leader = family.leader
            if leader is not None and leader.lane >= 0 and computed[leader.lane] >= family.length:
                del self._rebuilding[family]
                family.leader = None
                self._keep(family, leader)
                self._tidy(family)

    def drop(self, family: Family) -> None:
        """Give back the blocks that a family keeps; the next heir computes them for all."""
        if family.seq is not None:
            seq, family.seq = family.seq, None
            index = bisect.bisect_left(self.kept, family.rank, key=_rank)
            del self.kept[self.kept.index(family, index)]
            self.allocator.free([seq])

    def forget(self) -> None:
        """The weights have changed: nothing that was computed or is being computed is shared."""
        self.epoch += 1
        if self.prefix_cache:
            self.allocator.forget_prefixes()
        for family in [*self._families.values(), *self._rebuilding]:
            family.leader = None
        self._rebuilding.clear()
        for family in list(self.kept):
            self.drop(family)

    def record(self, seqs: Int64Array, tokens: Int64Array, counts: Int64Array) -> None:
        """Keys and values of these tokens, row by row, are now in blocks: others may find them."""
        if self.prefix_cache:
            self.allocator.record(seqs, tokens, counts)

    def close(self, request: Request) -> None:
        """Give the blocks back; the request may be opened again."""
        if request.seq is not None:
            seq, request.seq = request.seq, None
            self.allocator.free([seq])
        request.computed = 0
        family = request.family
        if family is None:  # it was never in the queue
            return
        if family.leader is request:
            family.leader = None
            self._rebuilding.pop(family, None)
        family.fresh.pop(request.order, None)
        family.heirs.pop(request.order, None)
        if not request.done:
            self._wait(request)
        self._tidy(family)

    def discard(self, request: Request) -> None:
        """As `close`, after a step that failed: its last block may not hold what was recorded."""
        if request.seq is not None:
            self.allocator.truncate([request.seq], [0])
        self.close(request)

    def _start(self, request: Request, tokens: Int64Array) -> tuple[int, int]:
        """A new sequence for a request, and how many of these tokens are in its blocks already."""
        if not self.prefix_cache:
            return int(self.allocator.allocate([0])[0]), 0
        seqs, hits = self.allocator.allocate_cached([tokens], request.salt)
        if request.priority:
            self.allocator.set_priority(seqs, max(-128, min(request.priority, 127)))
        return int(seqs[0]), int(hits[0])

    def _family_of(self, request: Request) -> Family:
        if request.logits_from >= 0:  # its logits are not those of the last prompt token
            return Family(None, len(request.prompt))
        known = None if self._newest is None else self._newest.key
        if known is None or known.prompt is not request.prompt or known.salt != request.salt:
            self._newest = Family(PromptKey(request.prompt, request.salt), len(request.prompt))
        assert self._newest is not None and self._newest.key is not None
        self._newest = self._families.setdefault(self._newest.key, self._newest)
        return self._newest

    def _has_beginning(self, request: Request) -> bool:
        """Whether a copy in host memory has what its family begins with, by these weights."""
        copy = request.swapped
        if copy is None or copy.epoch != self.epoch:
            return False
        return len(copy.tokens) >= _family(request).length

    def _wait(self, request: Request) -> None:
        """Count it among those who wait for their family's blocks, if it needs them."""
        if self._has_beginning(request):
            return
        family = _family(request)
        if family.key is not None:  # while it ran, a new family may have got the name
            family = request.family = self._families.setdefault(family.key, family)
        (family.heirs if _is_heir(request) else family.fresh)[request.order] = request

    def _keep(self, family: Family, source: Request) -> None:
        """Keep the blocks of a request that has computed just what the family begins with."""
        if family.heirs and family.seq is None:
            assert source.seq is not None
            family.seq = int(self.allocator.fork([source.seq])[0])
            family.rank = (source.key, source.order)
            bisect.insort(self.kept, family, key=_rank)

    def _tidy(self, family: Family) -> None:
        """Keep nothing for nobody."""
        if family.heirs:
            return
        self.drop(family)
        if family.key is None or family.leader is not None or family.fresh:
            return
        if self._families.get(family.key) is family:
            del self._families[family.key]
        if self._newest is family:
            self._newest = None


def _family(request: Request) -> Family:
    assert request.family is not None
    return request.family


def _is_heir(request: Request) -> bool:
    return request.length > _family(request).length


def _rank(family: Family) -> tuple[int, int]:
    return family.rank
