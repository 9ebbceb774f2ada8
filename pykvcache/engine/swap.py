"""Blocks of preempted requests in host memory, and what moving or computing them costs.

Read first: pykvcache/cache.py, blocks.py. Read next: engine.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pykvcache.batch import Int64Array
from pykvcache.cache import KVPool
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.request import Request

PROBE_BYTES = 16 * 2**20


@dataclass
class Swapped:
    """Contents of a sequence's present blocks.

    Attributes:
        epoch: of the weights that filled them.
        tokens: [computed] token ids of the sequence.
        positions: per group int64, which blocks of the table were present.
        data: per group and storage, [blocks, elements] in host memory.
        nbytes: of `data`.
    """

    epoch: int
    tokens: Int64Array
    positions: list[Int64Array]
    data: list[list[Tensor]]
    nbytes: int


class SwapSpace:
    """Host memory for blocks of preempted requests.

    Args:
        pool: where blocks come from and go to.
        blocks: who opens and closes the sequences of requests.
        limit: most bytes to hold.
    """

    def __init__(self, pool: KVPool, blocks: RequestBlocks, limit: int) -> None:
        self.pool, self.limit = pool, limit
        self._blocks, self._allocator = blocks, blocks.allocator
        self.used = self.peak = 0
        self.token_rate = 0.0  # prompt tokens a second, measured by the engine
        self._decode_rate = 0.0  # of steps without prompts, until there is one with some
        self._copy_rate: float | None = None

    def copy_seconds(self, nbytes: int) -> float:
        """Estimated time to move so many bytes out and in again."""
        if self._copy_rate is None:
            self._copy_rate = self._measure()
        return 2 * nbytes / self._copy_rate

    def compute_seconds(self, tokens: int) -> float:
        """Estimated time to compute keys and values of so many tokens again."""
        rate = self.token_rate or self._decode_rate
        return tokens / rate if rate else float(tokens)

    def observe(self, tokens: int, seconds: float, prompts: bool) -> None:
        """A step with so many tokens, some of them of prompts or not, took so long."""
        rate = tokens / max(seconds, 1e-9)
        if not prompts:
            self._decode_rate = rate
            return
        self.token_rate = rate if not self.token_rate else 0.8 * self.token_rate + 0.2 * rate

    def take(self, request: Request) -> float | None:
        """Move the blocks of a request here if there is room and that is cheaper; closes it.

        Returns what that and moving back take: twice the seconds that it took. None: not moved.
        """
        allocator, seq = self._allocator, request.seq
        assert seq is not None and request.swapped is None
        if request.epoch != self._blocks.epoch:  # other weights filled them
            return None
        tables = [allocator.block_table([seq], group)[0] for group in range(self._blocks.groups)]
        positions = [np.flatnonzero(table >= 0) for table in tables]
        nbytes = sum(
            len(present) * storage[0].nbytes
            for group, present in enumerate(positions)
            for storage in self.pool.group_storages(group)
        )
        if nbytes == 0 or self.used + nbytes > self.limit:
            return None
        if self.copy_seconds(nbytes) >= self.compute_seconds(request.computed):
            return None
        started, data = time.perf_counter(), []
        for group, present in enumerate(positions):
            blocks = torch.from_numpy(tables[group][present].astype(np.int64))
            storages = self.pool.group_storages(group)
            data.append([storage[blocks.to(storage.device)].cpu() for storage in storages])
        tokens = request.tokens[: request.computed]
        request.swapped = Swapped(request.epoch, tokens, positions, data, nbytes)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        self._blocks.close(request)
        return 2 * (time.perf_counter() - started)

    def restore(self, request: Request) -> None:
        """Move back what an opened request did not find in the pool; its copy here is given up.

        What other weights have filled is given up without that.

        Raises:
            OutOfBlocks: the pool is too full. After this and any other error the request is closed
                and its copy is still here.
        """
        swapped = request.swapped
        assert swapped is not None and request.seq is not None
        if swapped.epoch == self._blocks.epoch and request.computed < len(swapped.tokens):
            try:
                self._fill(request.seq, request.computed, swapped)
            except BaseException:
                self._blocks.discard(request)  # what it recorded may not be there
                raise
            request.computed = len(swapped.tokens)
        self.drop(request)

    def _fill(self, seq: int, hits: int, swapped: Swapped) -> None:
        """Let a sequence that begins with `hits` tokens from the pool have all that are here.

        Blocks that had left a window are not taken again.
        """
        allocator, size = self._allocator, self._allocator.block_size
        missing = len(swapped.tokens) - hits
        allocator.append([seq], missing)  # a block that it shares is exchanged, and written below
        for group, present in enumerate(swapped.positions):
            begin = int(present[0]) * size if len(present) else len(swapped.tokens)
            allocator.release_before([seq], begin, group)
            first = int(np.searchsorted(present, hits // size))  # not shared
            blocks = allocator.block_table([seq], group)[0][present[first:]]
            index = torch.from_numpy(blocks.astype(np.int64))
            storages = self.pool.group_storages(group)
            for storage, data in zip(storages, swapped.data[group], strict=True):
                storage[index.to(storage.device)] = data[first:].to(storage.device)
        self._blocks.record(np.array([seq]), swapped.tokens[hits:], np.array([missing]))

    def drop(self, request: Request) -> None:
        """Give up the copy of a request."""
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
