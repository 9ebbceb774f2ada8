"""Blocks of preempted requests in host memory, and what moving or computing them costs.

Read first: pykvcache/cache.py, blocks.py. Read next: engine.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pykvcache.batch import Int64Array
from pykvcache.cache import KVPool
from pykvcache.engine.request import Request

PROBE_BYTES = 16 * 2**20


@dataclass
class Swapped:
    """Contents of a sequence's present blocks.

    Attributes:
        computed: tokens of the sequence.
        positions: per group int64, which blocks of the table were present.
        data: per group and storage, [blocks, elements] in host memory.
        nbytes: of `data`.
    """

    computed: int
    positions: list[Int64Array]
    data: list[list[Tensor]]
    nbytes: int


class SwapSpace:
    """Host memory for blocks of preempted requests.

    Args:
        pool: where blocks come from and go to.
        windows: of each layer group, 0 = all positions.
        limit: most bytes to hold.
    """

    def __init__(self, pool: KVPool, windows: Sequence[int], limit: int) -> None:
        self.pool, self.windows, self.limit = pool, list(windows), limit
        self.used = self.peak = 0
        self.token_rate = 0.0  # prompt tokens a second, measured by the engine
        self._copy_rate: float | None = None

    def copy_seconds(self, nbytes: int) -> float:
        """Estimated time to move so many bytes out and in again."""
        if self._copy_rate is None:
            self._copy_rate = self._measure()
        return 2 * nbytes / self._copy_rate

    def compute_seconds(self, tokens: int) -> float:
        """Estimated time to compute keys and values of so many tokens again."""
        return tokens / self.token_rate if self.token_rate else float(tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with so many tokens of prompts took so long."""
        rate = tokens / max(seconds, 1e-9)
        self.token_rate = rate if not self.token_rate else 0.8 * self.token_rate + 0.2 * rate

    def take(self, request: Request) -> bool:
        """Move the blocks of a request here if there is room and that is cheaper; frees them."""
        allocator = self.pool.allocator
        assert allocator is not None and request.seq is not None
        tables = [allocator.block_table([request.seq], g)[0] for g in range(len(self.windows))]
        positions = [np.flatnonzero(table >= 0) for table in tables]
        nbytes = sum(
            len(present) * storage[0].nbytes
            for group, present in enumerate(positions)
            for storage in self.pool.group_storages(group)
        )
        if nbytes == 0 or self.used + nbytes > self.limit:
            return False
        if self.copy_seconds(nbytes) >= self.compute_seconds(request.computed):
            return False
        data = []
        for group, present in enumerate(positions):
            blocks = torch.from_numpy(tables[group][present].astype(np.int64))
            storages = self.pool.group_storages(group)
            data.append([storage[blocks.to(storage.device)].cpu() for storage in storages])
        request.swapped = Swapped(request.computed, positions, data, nbytes)
        allocator.free([request.seq])
        request.seq = None
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def restore(self, request: Request) -> None:
        """Give a request blocks again, with what they held.

        Raises:
            OutOfBlocks: the pool is too full; nothing has changed.
        """
        allocator, swapped = self.pool.allocator, request.swapped
        assert allocator is not None and isinstance(swapped, Swapped)
        seqs = allocator.allocate([swapped.computed])
        for group, window in enumerate(self.windows):
            present = swapped.positions[group]
            table = allocator.block_table(seqs, group)[0]
            blocks = torch.from_numpy(table[present].astype(np.int64))
            storages = self.pool.group_storages(group)
            for storage, data in zip(storages, swapped.data[group], strict=True):
                storage[blocks.to(storage.device)] = data.to(storage.device)
            if window:
                allocator.release_before(seqs, swapped.computed - window + 1, group)
        request.seq, request.computed = int(seqs[0]), swapped.computed
        self.drop(request)

    def drop(self, request: Request) -> None:
        """Forget what is held of a request."""
        if request.swapped is not None:
            self.used -= request.swapped.nbytes
            request.swapped = None

    def _measure(self) -> float:
        """Bytes a second from the pool's device to host memory and back, on a probe."""
        device = self.pool.device
        probe = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
        probe.cpu().to(device)  # pages and copy engines are warm afterwards
        start = time.perf_counter()
        probe.cpu().clone().to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2 * PROBE_BYTES / max(time.perf_counter() - start, 1e-9)
