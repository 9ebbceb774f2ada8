"""What one attention call needs to know of its batch, besides K and V: `AttentionMetadata`.

Built once per forward and layer group and reused by every layer of the group.

Read first: pykvcache/allocator.py. Read next: pykvcache/cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pykvcache.allocator import BlockAllocator


@dataclass
class AttentionMetadata:
    """The batch of one step in one layer group; B rows, T packed query tokens.

    Attributes:
        block_table: int32 [B, max_blocks]; -1 = unused, or a hole below seq_len.
        seq_lens: int32 [B], KV length including this step's tokens.
        cu_seqlens_q: int32 [B + 1], running sum of the rows' query counts.
        max_seqlen_q: longest row's query count.
        slot_mapping: int64 [T], where each new token goes; -1 skips it.
        plan: opaque work partition of the backend (`ops.plan`), or None.
    """

    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    slot_mapping: Tensor
    plan: Tensor | None = None

    @classmethod
    def of(
        cls,
        allocator: BlockAllocator,
        seqs: Sequence[int] | Tensor,
        counts: Sequence[int] | Tensor,
        group: int = 0,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Metadata of sequences whose last counts[b] tokens are this step's (already appended).

        Args:
            allocator: owner of the sequences.
            seqs: handles of the B rows.
            counts: new tokens of each row; 0 is legal.
            group: layer group.
            device: where the kernels run.
        """
        counts = torch.as_tensor(counts, dtype=torch.int64)
        cu_seqlens_q = torch.zeros(len(counts) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=cu_seqlens_q[1:])
        longest = int(counts.max()) if len(counts) else 0
        block_table = torch.as_tensor(allocator.block_table(seqs, group))
        seq_lens = torch.as_tensor(allocator.lengths(seqs))
        slots = torch.as_tensor(allocator.slot_mapping(seqs, counts, group))
        return cls(
            block_table.to(device),
            seq_lens.to(device),
            cu_seqlens_q.to(device),
            longest,
            slots.to(device),
        )
