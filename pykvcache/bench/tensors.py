"""Tensors of a kernel case, dense and in blocks, and what attention over them must be.

K and V are there often enough that calls on one copy after the other are cold; all copies hold the
same numbers. Blocks lie in shuffled order.

Read first: pykvcache/bench/cases.py. Read next: pykvcache/bench/kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from pykvcache import ops
from pykvcache.bench import environment
from pykvcache.bench.cases import FLOAT8, Case

COLD_BYTES = 256 * 2**20
MOST_POOL_BYTES = 4 * COLD_BYTES
MOST_COPIES = 2**15
CHECKED_QUERIES = 32
SEED = 0


def pool_bytes(case: Case, block_size: int) -> int:
    """Bytes of the whole blocks that hold K and V once."""
    slots = sum(-(-length // block_size) * block_size for length in case.lengths)
    return case.kv_bytes // sum(case.lengths) * slots


def count_copies(case: Case, block_sizes: Sequence[int]) -> int:
    """Copies of K and V that make calls cold, as far as their pools may grow."""
    largest = max((pool_bytes(case, size) for size in block_sizes), default=case.kv_bytes)
    wanted = -(-COLD_BYTES // case.kv_bytes)
    return max(1, min(wanted, MOST_COPIES, MOST_POOL_BYTES // largest))


def check_memory(case: Case, block_sizes: Sequence[int], device: str = "cpu") -> None:
    """Raise ValueError unless K and V, dense and in blocks, fit the memory that is free."""
    copies = count_copies(case, block_sizes)
    queries = 4 * case.batch * case.query_len * case.heads.num_heads * case.heads.head_dim
    dense = case.kv_bytes // case.dtype.itemsize * case.q_dtype.itemsize
    needed = copies * (dense + sum(pool_bytes(case, size) for size in block_sizes))
    needed += 16 * queries + 4 * dense  # outputs, and the reference's own in float32
    free = environment.free_memory(device)
    if free is not None and needed > free:
        sizes = ", ".join(map(str, block_sizes))
        raise ValueError(
            f"{case.name} in blocks of {sizes} needs {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free"
        )


class Tensors:
    """q, lengths, and copies of K and V of a case.

    `dense` has K and V of each group of rows, [copies, rows, HKV, L, D] in q's dtype; `queries` the
    parts of q [B, HQ, q, D] that go with them.
    """

    def __init__(self, case: Case, block_sizes: Sequence[int], device: str = "cpu") -> None:
        torch.manual_seed(SEED)
        self.device = torch.device(device)
        heads = case.heads
        self.case = case
        self.copies = count_copies(case, block_sizes)
        self.q = self._random((case.batch, heads.num_heads, case.query_len, heads.head_dim))
        self.kv_scale = None
        if case.dtype == FLOAT8:  # powers of two, so that q's dtype holds what the cache does
            self.kv_scale = (0.5 ** (torch.arange(heads.num_kv_heads) % 3)).to(self.device)
        self.dense = [
            (self._random_kv(rows, length), self._random_kv(rows, length))
            for rows, length in case.groups
        ]
        self.queries = self.q.split([rows for rows, _ in case.groups])
        self.packed_q = self.q.transpose(1, 2).flatten(0, 1).contiguous()  # [T, HQ, D]
        self.seq_lens = torch.tensor(case.lengths, dtype=torch.int32).to(self.device)
        steps = torch.arange(case.batch + 1, dtype=torch.int32)
        self.cu_seqlens_q = (steps * case.query_len).to(self.device)
        self.mask = None
        if case.phase == "chunk":
            seen = torch.arange(case.length)[None] - torch.arange(case.query_len)[:, None]
            self.mask = (seen <= case.length - case.query_len).to(self.device)

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.case.q_dtype)

    def _random_kv(self, rows: int, length: int) -> Tensor:
        """Numbers that the cache can hold, [copies, rows, HKV, length, D]; copies are the same."""
        heads = self.case.heads
        x = self._random((rows, heads.num_kv_heads, length, heads.head_dim))
        if self.kv_scale is not None:
            x = (self.stored(x).float() * self.kv_scale[:, None, None]).to(x.dtype)
        return x.expand(self.copies, *x.shape).contiguous()

    def stored(self, dense: Tensor) -> Tensor:
        """K or V [rows, HKV, L, D] as the cache holds it."""
        if self.kv_scale is None:
            return dense
        return (dense.float() / self.kv_scale[:, None, None]).to(self.case.dtype)

    @property
    def k(self) -> Tensor:
        """[copies, B, HKV, L, D], where all rows have one length."""
        return self.dense[0][0]

    @property
    def v(self) -> Tensor:
        return self.dense[0][1]

    def shuffled_blocks(self, block_size: int) -> tuple[Tensor, list[int]]:
        """Ids of each copy's blocks, row after row, int32 [copies, blocks]; blocks of each row."""
        counts = [-(-length // block_size) for length in self.case.lengths]
        order = torch.randperm(self.copies * sum(counts), dtype=torch.int32)
        return order.view(self.copies, -1), counts

    def fill(self, k_cache: Tensor, v_cache: Tensor, order: Tensor) -> None:
        """Write all copies into caches [num_blocks, HKV, block_size, D]; `order` as above."""
        block_size = k_cache.shape[2]
        blocks = [rows * -(-length // block_size) for rows, length in self.case.groups]
        for ids, sides in zip(order.split(blocks, dim=1), self.dense, strict=True):
            for cache, dense in zip((k_cache, v_cache), sides, strict=True):
                for copy in range(self.copies):
                    _fill(cache, ids[copy].view(dense.shape[1], -1), self.stored(dense[copy]))

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Packed query numbers, and their output by the reference in float32 [n, HQ, D].

        The reference sees K and V as one block a row. A prefill is checked at its first, middle and
        last queries, which are prefills of their own that end there.
        """
        case = self.case
        count = min(CHECKED_QUERIES, case.query_len)
        ends = sorted({count, max(count, case.query_len // 2), case.query_len})
        chosen, outputs = [], []
        first = 0
        for (rows, length), sides in zip(case.groups, self.dense, strict=True):
            k, v = (side[0].float() for side in sides)
            begins = torch.arange(first, first + rows)[:, None] * case.query_len
            first += rows
            for end in ends:
                queries = (begins + torch.arange(end - count, end)).flatten()
                seen = length - (case.query_len - end)
                out, _ = ops.paged_attention(
                    self.packed_q[queries].float(),
                    k,
                    v,
                    torch.arange(rows, dtype=torch.int32, device=self.device)[:, None],
                    torch.full((rows,), seen, dtype=torch.int32, device=self.device),
                    torch.arange(rows + 1, dtype=torch.int32, device=self.device) * count,
                    count,
                    backend="reference",
                )
                chosen.append(queries)
                outputs.append(out.cpu())
        return torch.cat(chosen), torch.cat(outputs)


def _fill(cache: Tensor, table: Tensor, rows: Tensor) -> None:
    """Write rows [B, HKV, L, D] into the blocks that table [B, blocks] names; zeros after L."""
    shape = (table.shape[1], cache.shape[2])
    room = shape[0] * shape[1] - rows.shape[2]
    whole = pad(rows.view(torch.uint8), (0, 0, 0, room))  # bytes: float8 knows few operations
    blocks = whole.unflatten(2, shape).transpose(1, 2)  # [B, blocks, HKV, block_size, bytes of D]
    cache.view(torch.uint8)[table.long().to(cache.device)] = blocks
