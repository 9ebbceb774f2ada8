"""The block allocator: which blocks of a pool belong to which sequence.

`BlockAllocator` deals in block ids and never sees a tensor. Sequences are int64 handles, every call
is batched, and a call that raises has changed nothing. The work is done in csrc/allocator/ (start
with allocator.h); here arguments are checked and results become numpy arrays, which
`torch.from_numpy` takes as they are. Read next: batch.py (one call a decode step), then cache.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from pykvcache.batch import Batch, Int32Array, Int64Array, int_argument
from pykvcache.errors import (
    AllocatorError,
    DoubleFree,
    IntegrityError,
    OutOfBlocks,
    SnapshotError,
    UnknownBlock,
    UnknownSequence,
)
from pykvcache.pool_stats import PoolStats

if TYPE_CHECKING:
    from pykvcache import _C

__all__ = [
    "AllocatorError",
    "Batch",
    "BlockAllocator",
    "DoubleFree",
    "IntegrityError",
    "OutOfBlocks",
    "PoolStats",
    "SnapshotError",
    "UnknownBlock",
    "UnknownSequence",
]


def _load_core() -> Any:
    import torch  # noqa: F401  (loads the libraries that the extension links to)

    try:
        from pykvcache import _C
    except ImportError as error:
        raise ImportError(
            f"the block allocator needs the compiled extension pykvcache._C: {error}; "
            "build it with `pip install .`"
        ) from error
    return _C


MAX_GROUPS = 1024
Prompts: TypeAlias = Sequence[ArrayLike]


class BlockAllocator:
    """Gives blocks of one pool to sequences, lets them share blocks, and takes them back.

    A sequence has one length and, for each layer group, its own block table. Shared blocks are
    copied when one of their owners writes (`append()` says which). Arguments may be lists, numpy
    arrays or CPU tensors of integers; where there is one value for each row, an int stands for all
    rows. Calls may come from several threads.

    With `prefix_cache`, `record()` tells which tokens the blocks hold, and blocks that nobody uses
    any more are "cached": `allocate_cached()` finds them again, until they are needed for something
    else. A prefix is found by comparing its tokens and never by a hash alone.

    Args:
        num_blocks: blocks in the pool.
        block_size: token slots of a block.
        groups: number of layer groups.
        layers: number of layers of each group, if they differ. Groups share the pool's tensors by
            position; with `layers`, `stats()` counts what the smaller groups leave unused.
        prefix_cache: keep an index of what blocks hold.
        windows: for the prefix cache, how many of the last tokens each group reads (0 = all of
            them): only their blocks have to be there for a hit.

    Raises:
        ValueError: a size is not positive or too large.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        groups: int | None = None,
        layers: Sequence[int] | None = None,
        prefix_cache: bool = False,
        windows: Sequence[int] = (),
    ) -> None:
        if groups is not None and groups > MAX_GROUPS:
            raise ValueError(f"groups must be 1 to {MAX_GROUPS}, got {groups}")
        layers = (1,) * (1 if groups is None else groups) if layers is None else tuple(layers)
        if groups not in (None, len(layers)):
            raise ValueError(f"groups is {groups} but layers has {len(layers)} entries: {layers}")
        if windows and not prefix_cache:
            raise ValueError(f"windows is {windows}, but only prefix_cache=True uses it")
        index = (int_argument("windows", windows),) if prefix_cache else ()
        self._core: _C.Allocator = _load_core().Allocator(num_blocks, block_size, layers, *index)
        self._block_size = block_size
        self._layers = layers
        self._no_copies = [np.empty((0, 2), np.int64)] * len(layers)

    @property
    def block_size(self) -> int:
        """Token slots of a block."""
        return self._block_size

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return len(self._layers)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._core.num_blocks()

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, cached ones among them: all that can be given out."""
        return self._core.num_free()

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and whose content can be found again."""
        return self._core.num_cached()

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        return self._core.num_sequences()

    @property
    def peak(self) -> int:
        """Most blocks that were in use at once; ids that were ever given out are below it."""
        return self._core.peak()

    def allocate(self, lengths: ArrayLike) -> Int64Array:
        """New sequences of `lengths` tokens, blocks included; returns their handles [B]."""
        return _int64(self._core.allocate(int_argument("lengths", lengths)))

    def allocate_cached(
        self, prompts: Prompts, salts: ArrayLike = 0
    ) -> tuple[Int64Array, Int64Array]:
        """New sequences that share the longest known beginning of each prompt.

        A sequence starts with hits[row] tokens, as if they had been appended and recorded; it may
        end inside a block, which is copied when it is written. At least one token must be computed
        to go on, so a caller who has a whole prompt gives all but its last token.

        Args:
            prompts: for each row its token ids.
            salts: [B]; rows with different salts have nothing in common.

        Returns:
            seqs, hits: int64 [B] handles, and how many tokens of each prompt are there.
        """
        seqs, hits = self._core.allocate_cached(*ragged(prompts), int_argument("salts", salts))
        return _int64(seqs), _int64(hits)

    def lookup(self, prompts: Prompts, salts: ArrayLike = 0) -> Int64Array:
        """The hits [B] that allocate_cached() would have; nothing changes."""
        return _int64(self._core.lookup(*ragged(prompts), int_argument("salts", salts)))

    def record(self, seqs: ArrayLike, tokens: ArrayLike, counts: ArrayLike = 1) -> None:
        """Tell that the blocks hold the keys and values of the next `counts` tokens of each row.

        A block can be found once it is full, and the last one of a sequence when the sequence ends.
        A full block whose content is known already is exchanged for the known one, so that block
        tables change. Only what is recorded from the first token on, without a gap, can be found.

        Args:
            tokens: [sum(counts)] token ids, row by row.

        Raises:
            ValueError: a row would have more tokens recorded than it has.
        """
        args = int_argument("seqs", seqs), int_argument("tokens", tokens)
        self._core.record(*args, int_argument("counts", counts))

    def set_priority(self, seqs: ArrayLike, priorities: ArrayLike) -> None:
        """Say how long the blocks of sequences, present and future, stay cached.

        Blocks of the lowest priority (-128 to 127, 0 unless set) are evicted first, among them
        those that were used longest ago.
        """
        args = int_argument("seqs", seqs), int_argument("priorities", priorities)
        self._core.set_priority(*args)

    def forget_prefixes(self) -> None:
        """Nothing that was recorded so far is found again: the weights have changed.

        Sequences go on; what they record further on builds on old tokens and is not found either.
        """
        self._core.forget_prefixes()

    def append(self, seqs: ArrayLike, counts: ArrayLike = 1) -> list[Int64Array]:
        """Add `counts` tokens to the sequences.

        Returns:
            Per group int64 [N, 2]: (src, dst) blocks that `ops.copy_blocks` must copy before the
            new tokens are written and before the next call, because src is shared or cached.

        Raises:
            OutOfBlocks: the pool has not enough blocks for all rows; nothing has changed.
        """
        copies = self._core.append(int_argument("seqs", seqs), int_argument("counts", counts))
        if copies is None:
            return list(self._no_copies)
        return [_int64(pairs).reshape(-1, 2) for pairs in copies]

    def reserve(self, seqs: ArrayLike, capacities: ArrayLike) -> None:
        """Take blocks ahead, so that the sequences can grow to `capacities` tokens without more."""
        self._core.reserve(int_argument("seqs", seqs), int_argument("capacities", capacities))

    def fork(self, seqs: ArrayLike, n: int = 1) -> Int64Array:
        """`n` new sequences for each of `seqs`, sharing its blocks; [B * n], row by row."""
        return _int64(self._core.fork(int_argument("seqs", seqs), n))

    def select(self, seqs: ArrayLike, index: ArrayLike) -> Int64Array:
        """Reorder, repeat and drop rows: new row i shares the blocks of seqs[index[i]].

        All of `seqs` are consumed. Returns handles [len(index)].
        """
        return _int64(self._core.select(int_argument("seqs", seqs), int_argument("index", index)))

    def truncate(self, seqs: ArrayLike, lengths: ArrayLike) -> None:
        """Shorten the sequences to `lengths` tokens, and give back reserved blocks.

        Raises:
            ValueError: a length is above the present one, or below tokens that were released.
        """
        self._core.truncate(int_argument("seqs", seqs), int_argument("lengths", lengths))

    def release_before(self, seqs: ArrayLike, positions: ArrayLike, group: int = 0) -> None:
        """Declare that tokens below `positions` are not attended again by layers of `group`.

        Blocks that lie wholly below are given back and their entries become -1. Positions below 0
        do nothing; those beyond the end mean the end.
        """
        args = int_argument("seqs", seqs), int_argument("positions", positions)
        self._core.release_before(*args, group)

    def free(self, seqs: ArrayLike) -> None:
        """End the sequences and give back their blocks."""
        self._core.free(int_argument("seqs", seqs))

    def pin(self, blocks: ArrayLike) -> None:
        """Hold blocks in use: neither given out again nor written, until as many unpin() calls."""
        self._core.pin(int_argument("blocks", blocks))

    def unpin(self, blocks: ArrayLike) -> None:
        """Undo one pin of each block."""
        self._core.unpin(int_argument("blocks", blocks))

    def pin_sequences(self, seqs: ArrayLike) -> Int64Array:
        """Pin all present blocks of the sequences; returns the block ids, to unpin later."""
        return _int64(self._core.pin_sequences(int_argument("seqs", seqs)))

    def grow(self, num_blocks: int) -> None:
        """The pool has become larger; block ids stay valid."""
        self._core.grow(num_blocks)

    def lengths(self, seqs: ArrayLike) -> Int32Array:
        """Tokens of each sequence, [B]."""
        return np.frombuffer(self._core.lengths(int_argument("seqs", seqs)), np.int32)

    def block_table(self, seqs: ArrayLike, group: int = 0) -> Int32Array:
        """Block ids [B, most blocks of a row]; -1: the row has no such block, or released it."""
        seqs = int_argument("seqs", seqs)
        table = np.frombuffer(self._core.block_table(seqs, group), np.int32)
        rows = self._num_rows(seqs)
        return table.reshape(rows, table.size // max(rows, 1))

    def slot_mapping(
        self, seqs: ArrayLike, counts: ArrayLike, group: int = 0, width: int = 0
    ) -> Int64Array:
        """Slots of the last `counts` tokens of each sequence.

        [sum(counts)], or with `width` > 0 [B * width], where the first width - counts[row] entries
        of a row are -1 (left padding).
        """
        args = int_argument("seqs", seqs), int_argument("counts", counts)
        return _int64(self._core.slot_mapping(*args, group, width))

    def batch(
        self,
        seqs: ArrayLike,
        *,
        windows: Sequence[int] = (),
        chunks: Sequence[int] = (),
        columns: int = 0,
    ) -> Batch:
        """Metadata arrays for `seqs`; its `step()` is append() and all views in one call.

        Args:
            windows, chunks: what each group still reads of the past, see `Batch.set_reach()`.
            columns: width of the block tables to begin with; they grow when a row needs more.
        """
        return Batch(self._core, self.groups, seqs, windows, chunks, columns)

    def stats(self) -> PoolStats:
        """Where the slots of the pool are. Walks all tables: not for every step."""
        return PoolStats(**self._core.stats())

    def check_integrity(self) -> None:
        """Recount every reference, table and free block; IntegrityError says what is wrong."""
        self._core.check_integrity()

    def snapshot(self) -> bytes:
        """The whole state, for restore(). Handles and block ids stay what they are.

        But for the prefix index: what cached blocks hold may have changed until then.
        """
        return self._core.snapshot()

    def restore(self, snapshot: bytes) -> None:
        """Go back to a snapshot of an allocator with the same block size and groups.

        A prefix cache is empty then, and what its sequences record is not found.

        Raises:
            SnapshotError: the bytes are damaged or no snapshot; nothing has changed.
            ValueError: they are of another geometry, or of a larger pool.
        """
        if not isinstance(snapshot, bytes):
            raise TypeError(f"snapshot must be bytes, got {type(snapshot).__name__}")
        self._core.restore(snapshot)

    def clone(self) -> BlockAllocator:
        """An independent copy, in which all handles mean the same sequences."""
        clone = copy.copy(self)
        clone._core = self._core.clone()
        return clone

    def __repr__(self) -> str:
        return (
            f"BlockAllocator(num_blocks={self.num_blocks}, block_size={self.block_size}, "
            f"groups={self.groups}, num_free={self.num_free}, num_sequences={self.num_sequences})"
        )

    @staticmethod
    def _num_rows(seqs: bytes | list[int] | tuple[int, ...] | int) -> int:
        return (
            len(seqs) // 8 if isinstance(seqs, bytes) else 1 if isinstance(seqs, int) else len(seqs)
        )


def ragged(prompts: Prompts) -> tuple[bytes, bytes]:
    """Token ids of all prompts one after the other, and how many each has: int64 bytes."""
    rows = [np.asarray(prompt) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(
                f"prompts[{number}] must be a list of token ids, got shape {list(row.shape)}"
            )
        if row.size and (row.dtype.kind not in "iu" or row.dtype == np.uint64):
            raise TypeError(f"prompts[{number}] must be integers, got {row.dtype}")
    counts = np.array([row.size for row in rows], np.int64)
    tokens = np.concatenate([np.empty(0, np.int64), *(row.astype(np.int64) for row in rows)])
    return tokens.tobytes(), counts.tobytes()


def _int64(buffer: bytearray) -> Int64Array:
    return np.frombuffer(buffer, np.int64)
