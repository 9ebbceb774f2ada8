"""The rows of a `PagedCache`: sequences, padding, and the metadata of the current forward.

transformers counts positions with the left padding of a batch, the pool stores none of it. `seen`
is the padded length that all rows have in common; row b holds its own seen - pads[b] tokens, so its
padded position p is stored position p - pads[b]. Only a model that reads keys by itself gets its
padding stored, since such a model need not mask it.

Read first: pykvcache/cache.py, pykvcache/batch.py. Read next: pykvcache/hf/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pykvcache.allocator import BlockAllocator, OutOfBlocks
from pykvcache.batch import Batch, Int64Array
from pykvcache.cache import KVPool
from pykvcache.hf.notes import Notes
from pykvcache.hf.plans import Plans
from pykvcache.metadata import AttentionMetadata

if TYPE_CHECKING:
    from pykvcache.hf.layer import PagedLayer

FIRST_BLOCKS = 64  # of a pool that grows
KEPT = 4  # calls whose blocks a pool with a prefix cache holds, if its size is not given


class Rows:
    """One sequence per row of the batch, in every layer group.

    Args:
        pool: where the blocks are; several caches may share it.
        windows: of each layer group, 0 = all positions.
        max_length: padded length that no row will exceed, to size the pool; None = unknown.
    """

    def __init__(self, pool: KVPool, windows: Sequence[int], max_length: int | None = None) -> None:
        self.pool, self.windows, self.max_length = pool, list(windows), max_length
        self.seen = 0
        self.recording = False
        self.pads: list[int] | None = None  # not stored; None: no row has padding
        self.keeps_padding = False
        self.metadata: list[AttentionMetadata] = []  # of the current forward, by group
        self.plans = Plans(pool)
        self._seqs: Int64Array | None = None
        self._batch: Batch | None = None
        self._revision = -1
        self._announced = -1
        self._announced_pads: list[int] | None = None  # to be taken over, if the forward is so long
        self._first: tuple[PagedLayer, Tensor, Tensor] | None = None  # see `hold`
        self.notes = Notes() if pool.prefix_cache else None

    def __del__(self) -> None:
        try:
            self.record()
        finally:
            self._free()

    @property
    def allocator(self) -> BlockAllocator:
        """The pool's allocator; there is one from the first update on."""
        assert self.pool.allocator is not None
        return self.pool.allocator

    @property
    def seqs(self) -> Int64Array:
        """Handles of the rows."""
        assert self._seqs is not None
        return self._seqs

    def open(self, k: Tensor, v: Tensor) -> None:
        """Size the pool for a first update with k [B, HKV, T, D] and v [B, HKV, T, Dv]."""
        if self._announced_pads is not None:
            self._take_pads(k.shape[0], k.shape[2])
        wanted = self._wanted_blocks(k.shape[0], k.shape[2])
        self.pool.open(k, v, wanted if self.notes is None else KEPT * wanted)

    def _wanted_blocks(self, batch: int, tokens: int) -> int:
        """Blocks for all rows up to max_length; a windowed group holds the prompt or its window."""
        if self.max_length is None:
            return FIRST_BLOCKS
        size, total = self.pool.block_size, 0
        for pad in self.pads or [0] * batch:
            prompt = -(-(tokens - pad) // size)
            whole = -(-(max(self.max_length, tokens) - pad) // size)
            later = (min(-(-w // size) + 2, whole) if w else whole for w in self.windows)
            total += max(prompt * len(self.windows), sum(later))
        return total

    def announce(self, mask: Tensor | None) -> None:
        """Take note of the 2D mask [B, seen + T] of the forward that begins.

        Plain left padding is not stored from then on. After any other mask, or when the forward
        turns out to have other positions than the mask (a model may put tokens of its own before
        those it is given), `announced` is False for this forward, everything is stored and
        attention needs a dense mask.
        """
        self._announced, self._announced_pads = -1, None
        if mask is None or mask.dim() != 2:
            return
        width = mask.shape[1]
        real = (mask if mask.dtype in (torch.bool, torch.int64) else mask != 0).cpu().numpy()
        if self.pads is None and real.all():
            self._announced = width
            return
        if self.keeps_padding:
            return
        real = real != 0
        pads = (width - real.sum(1)).tolist()
        for row, start in enumerate(real.argmax(1).tolist()):
            if start != pads[row] and pads[row] != width:
                return
        if self.seen > 0 and not self._extends(pads):
            return
        self._announced, self._announced_pads = width, pads

    def _take_pads(self, batch: int, end: int) -> None:
        """Drop the padding announced, if it is that of the forward up to position `end`."""
        pads, self._announced_pads = self._announced_pads, None
        if self._announced != end or pads is None or len(pads) != batch:
            self._announced = -1
            return
        self.pads = pads if any(pads) else None

    def _extends(self, pads: list[int]) -> bool:
        """Whether `pads` is what is known so far; rows of nothing but padding may get more."""
        known = self.pads or [0] * len(pads)
        return len(known) == len(pads) and all(
            new == old or (old == self.seen and new > old)
            for old, new in zip(known, pads, strict=True)
        )

    @property
    def announced(self) -> bool:
        """Whether the 2D mask of the current forward is plain left padding, as stored."""
        return self._announced == self.seen

    def expects(self, seen: int, tokens: int) -> bool:
        """Whether a layer at `seen` that gets so many tokens is in step with the others."""
        return seen == self.seen or seen + tokens == self.seen

    def append(self, batch: int, tokens: int) -> None:
        """Begin a forward: take blocks for `tokens` new positions, bring the metadata up to date.

        Raises:
            OutOfBlocks: a pool of fixed size is full; nothing has changed.
            ValueError: the batch has another number of rows than before.
        """
        step = self._batch
        if step is None:
            step = self._start(batch)
        elif batch != len(self.seqs):
            raise ValueError(f"the cache holds {len(self.seqs)} rows but keys have {batch}")
        end, pads = self.seen + tokens, self.pads
        if self._announced_pads is not None:
            self._take_pads(batch, end)
        self._first = None
        counts: int | list[int] = tokens
        if self.pads is not None:
            counts = [min(tokens, max(end - pad, 0)) for pad in self.pads]
        while True:
            total = self.pool.num_blocks
            try:
                with self.pool.lock:  # a source may be given out by the next step of another cache
                    for group, pairs in enumerate(step.step(counts, tokens, not self.recording)):
                        if len(pairs):
                            self.pool.copy_blocks(group, torch.from_numpy(pairs))
                break
            except OutOfBlocks as error:
                if not self.pool.growable:
                    self.pads = pads
                    if self.seen == 0:
                        self.reset()
                    raise
                self.pool.grow(error.needed, total)
        self.seen = end
        if step.revision != self._revision or self.pool.device.type != "cpu":
            self._refresh(step)

    def hold(self, layer: PagedLayer, k: Tensor, v: Tensor) -> None:
        """Keep what the first layer wrote in the first forward, as long as that lasts.

        Args:
            k, v: [B, HKV, T, D] and [B, HKV, T, Dv], with the padding that was not stored.
        """
        self._first = layer, k, v

    def store_padding(self, layer: PagedLayer) -> None:
        """Other code than ours is about to read keys or values of `layer`.

        It may do without a mask. If the padding was not stored but is still at hand, it is stored
        after all, now and from here on.

        Raises:
            OutOfBlocks: a pool of fixed size is full; the rows are empty.
        """
        self.pool.read_by_others = True
        if self._first is None or self._first[0] is not layer:
            return
        _, k, v = self._first
        batch, _, tokens, _ = k.shape
        self._forget()
        self.keeps_padding, layer.seen = True, 0
        self.append(batch, tokens)
        with self.pool.lock:
            layer.write(k, v, tokens)
        layer.seen = tokens

    def begin_with(self, seqs: Int64Array, seen: int, pads: list[int]) -> None:
        """Start with sequences that hold what is real of the first `seen` padded positions."""
        self.seen, self.pads = seen, pads if any(pads) else None
        assert self.notes is not None
        self.notes.end = seen
        self._open_batch(seqs)

    def _start(self, batch: int) -> Batch:
        return self._open_batch(self.allocator.allocate([0] * batch))

    def _open_batch(self, seqs: Int64Array) -> Batch:
        self._seqs = seqs
        columns = -(-(self.max_length or 0) // self.pool.block_size)
        self._batch = self.allocator.batch(self._seqs, windows=self.windows, columns=columns)
        return self._batch

    def _refresh(self, step: Batch) -> None:
        device = self.pool.device
        seq_lens = torch.from_numpy(step.seq_lens).to(device)
        cu_seqlens_q = torch.from_numpy(step.cu_seqlens_q).to(device)
        self.metadata = [
            AttentionMetadata(
                torch.from_numpy(table).to(device),
                seq_lens,
                cu_seqlens_q,
                step.max_seqlen_q,
                torch.from_numpy(slots).to(device),
            )
            for table, slots in zip(step.block_tables, step.slot_mappings, strict=True)
        ]
        self._revision = step.revision
        self.plans.clear()

    def crop(self, remove: int) -> None:
        """Forget the last `remove` positions, and what left the windows while recording.

        Raises:
            RuntimeError: positions that become visible again were released.
        """
        self.record()
        remove = min(remove, self.seen)
        window = min((w for w in self.windows if w), default=0)
        if remove and window and self.seen >= window and not self.recording:
            raise RuntimeError(
                "positions outside the sliding window are gone: call activate_past_recording() on "
                "the cache before what is to be cropped"
            )
        end = self.seen - remove
        lengths: int | list[int] = end
        if self.pads is not None:
            self.pads = [min(pad, end) for pad in self.pads]
            lengths = [end - pad for pad in self.pads]
        if remove:
            self.allocator.truncate(self.seqs, lengths)
            if self.notes is not None:
                self.notes.end = min(self.notes.end, end)
        self.seen, self._announced = end, -1
        for group, size in enumerate(self.windows):
            if size and self.recording:
                positions = np.asarray(lengths) - size + 1
                self.allocator.release_before(self.seqs, positions, group)

    def select(self, index: list[int]) -> None:
        """New row i is row index[i]; blocks are shared and copied when written."""
        if self._seqs is None or self._batch is None:
            return
        self.record()
        self._seqs = self.allocator.select(self._seqs, index)
        self._batch.bind(self._seqs)
        if self.pads is not None:
            pads = self.pads
            self.pads = [pads[i] for i in index]

    def fork(self) -> Rows:
        """Rows with the same tokens, sharing all blocks."""
        self.record()
        copy = Rows(self.pool, self.windows, self.max_length)
        if copy.notes is not None and self.notes is not None:
            copy.notes.end = self.notes.end
        copy.seen, copy.recording, copy.keeps_padding = (
            self.seen,
            self.recording,
            self.keeps_padding,
        )
        copy.pads = None if self.pads is None else list(self.pads)
        if self._seqs is not None:
            copy._seqs = self.allocator.fork(self._seqs)
            copy._batch = self.allocator.batch(copy._seqs, windows=self.windows)
        return copy

    def reset(self) -> None:
        """Forget every row and give its blocks back."""
        self.record()
        self._forget()
        if self.notes is not None:
            self.notes = Notes()

    def _forget(self) -> None:
        self._free()
        self._seqs = self._batch = self.pads = self._first = self._announced_pads = None
        self.seen, self._announced, self._revision = 0, -1, -1

    def record(self) -> None:
        """Tell the prefix index which tokens the rows hold."""
        if self.notes is not None and self._seqs is not None:
            self.notes.record(self.allocator, self._seqs, self.pads)

    def _free(self) -> None:
        if self._seqs is not None and self.pool.allocator is not None:
            self.pool.allocator.free(self._seqs)
