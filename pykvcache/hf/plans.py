"""Work partitions of attention on a GPU: made once a forward, shared by layers.

Read next: rows.py, packed.py.
"""

from __future__ import annotations

from torch import Tensor

from pykvcache.cache import KVPool
from pykvcache.metadata import AttentionMetadata


class Plans:
    """The plans of the current forward.

    Args:
        pool: whose backend makes them.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._made: dict[tuple[int, ...], Tensor] = {}

    def clear(self) -> None:
        """Another forward begins."""
        self._made.clear()

    def plan(
        self, q: Tensor, k_cache: Tensor, metadata: AttentionMetadata, group: int, window: int,
        chunk: int,
    ) -> Tensor | None:  # fmt: skip
        """The plan for queries [T, HQ, D] of a layer; None where operators need none.

        Args:
            metadata, group: of the layer's group.
        """
        if self._pool.ops.backend in ("cpu", "reference"):
            return None
        heads = q.shape[1], k_cache.shape[1], q.shape[2]
        key = (group, window, chunk, *heads)
        if key not in self._made:
            self._made[key] = self._pool.ops.plan(
                metadata.seq_lens,
                metadata.cu_seqlens_q,
                metadata.max_seqlen_q,
                *heads,
                window,
                chunk,
                self._pool.deterministic,
            )
        return self._made[key]
