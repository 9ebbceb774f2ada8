"""Metadata arrays of a batch, brought up to date by one call a step.

A `Batch` lists sequences of one allocator as rows. `step()` appends tokens to every row and writes
the arrays that the operators read: block tables [B, columns] int32, slot mappings [T] int64,
seq_lens [B] and cu_seqlens_q [B + 1] int32. The arrays stay the same objects until `revision`
changes, so tensors over them (`torch.from_numpy`) can be kept. csrc/allocator/batch.cpp writes only
what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from pykvcache import _C

Int32Array: TypeAlias = NDArray[np.int32]
Int64Array: TypeAlias = NDArray[np.int64]
IntArgument: TypeAlias = "bytes | list[int] | tuple[int, ...] | int"

_INT64 = np.dtype(np.int64)


def int_argument(name: str, values: Any) -> IntArgument:
    """What the extension takes for integers: int64 bytes of an array, else the list, tuple or int.

    Raises TypeError if `values` are not integers and ValueError if they have several dimensions.
    """
    if type(values) is np.ndarray and values.dtype is _INT64 and values.ndim == 1:
        return values.tobytes()
    if isinstance(values, (int, list, tuple)):
        return values
    array = np.asarray(values)
    if array.dtype is not _INT64:
        if array.dtype.kind not in "iu" or array.dtype == np.uint64:
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        array = array.astype(np.int64)
    if array.ndim == 0:
        return int(array)
    if array.ndim > 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(array.shape)}")
    return array.tobytes()


class Batch:
    """Rows of a batch and their metadata; made by `BlockAllocator.batch()`.

    One thread steps a batch; several batches, also over the same sequences, may live side by side.

    Attributes:
        seqs: int64 [B] handles, row by row.
        block_tables: per group int32 [B, columns], -1 where a row has no block.
        slot_mappings: per group int64 [T] slots of this step's tokens, -1 for padding.
        seq_lens: int32 [B] tokens of each row, this step's included.
        cu_seqlens_q: int32 [B + 1] first token of each row in the step, and T.
        max_seqlen_q: most tokens of a row in the step.
        num_tokens: T.
        revision: changes when arrays were replaced.
    """

    def __init__(
        self,
        core: _C.Allocator,
        groups: int,
        seqs: ArrayLike,
        windows: Sequence[int],
        chunks: Sequence[int],
        columns: int,
    ) -> None:
        from pykvcache import _C

        self._core = _C.Batch(core)
        self._groups = groups
        self._columns = columns
        self._capacity = 0
        self._no_copies = [np.empty((0, 2), np.int64) for _ in range(groups)]
        self.num_tokens = -1
        self.max_seqlen_q = 0
        self.revision = 0
        self.set_reach(windows, chunks)
        self.bind(seqs)

    def set_reach(self, windows: Sequence[int] = (), chunks: Sequence[int] = ()) -> None:
        """Set what each group still reads of the past: a window, a chunk, or 0 for everything.

        A window counts the current token. A step gives back the blocks that lie wholly out of reach
        of its tokens and of all later ones.
        """
        for name, values in (("windows", windows), ("chunks", chunks)):
            if len(values) not in (0, self._groups) or not all(0 <= v < 2**31 for v in values):
                wanted = f"0 to {2**31 - 1} for each of {self._groups} groups"
                raise ValueError(f"{name} must be {wanted}, got {values}")
        none = (0,) * self._groups
        self._core.set_reach(tuple(windows) or none, tuple(chunks) or none)

    def bind(self, seqs: ArrayLike) -> None:
        """Make `seqs` the rows of the next steps; rows that stay are not written anew."""
        self._core.bind(int_argument("seqs", seqs))
        self.seqs: Int64Array = np.array(seqs, np.int64).reshape(-1)

    def step(self, counts: ArrayLike = 1, width: int = 0, release: bool = True) -> list[Int64Array]:
        """Append `counts` tokens to the rows and bring all arrays up to date.

        Args:
            counts: new tokens of each row, or one int for all rows.
            width: 0 packs the rows, T = sum(counts). Otherwise each row has `width` query tokens,
                the last counts[row] of them real: T = B * width, and padding has slot -1.
            release: give back blocks that left the reach of their group.

        Returns:
            Per group int64 [N, 2], (src, dst) for `ops.copy_blocks`, to copy before anything is
            written.

        Raises:
            OutOfBlocks, UnknownSequence, ValueError: nothing has changed.
        """
        if type(counts) is not int:
            counts = int_argument("counts", counts)
        result = self._core.step(counts, width, release)
        if result is None:
            self._resize(*self._core.needs())
            result = self._core.step(counts, width, release)
            assert result is not None
        tokens, self.max_seqlen_q, copies = result
        if tokens != self.num_tokens:
            self._set_tokens(tokens)
        if copies is None:
            return self._no_copies
        return [np.frombuffer(pairs, np.int64).reshape(-1, 2) for pairs in copies]

    def _resize(self, tokens: int, columns: int) -> None:
        rows = len(self.seqs)
        if columns > self._columns:
            self._columns = max(columns, 3 * self._columns // 2, 16)
        self._capacity = max(tokens, self._capacity)
        shape = (rows, self._columns)
        tables = tuple(np.full(shape, -1, np.int32) for _ in range(self._groups))
        slots = tuple(np.empty(self._capacity, np.int64) for _ in range(self._groups))
        seq_lens, cu_seqlens_q = np.zeros(rows, np.int32), np.zeros(rows + 1, np.int32)
        self._arrays = (tables, slots, seq_lens, cu_seqlens_q)
        self._core.set_arrays(
            tuple(table.ctypes.data for table in tables),
            tuple(mapping.ctypes.data for mapping in slots),
            seq_lens.ctypes.data,
            cu_seqlens_q.ctypes.data,
            self._columns,
            self._capacity,
        )
        self.block_tables, self.seq_lens, self.cu_seqlens_q = tables, seq_lens, cu_seqlens_q
        self._set_tokens(tokens)

    def _set_tokens(self, tokens: int) -> None:
        self.num_tokens = tokens
        self.slot_mappings = tuple(slots[:tokens] for slots in self._arrays[1])
        self.revision += 1
