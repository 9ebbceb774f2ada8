"""What this machine can do at most, to divide by: read bandwidth and matrix-multiply rate.

Both are contenders for `timing.interleave`, so that a peak is measured in the same minutes as what
is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pykvcache.bench.timing import Contender, Timing

READ_BYTES = 2**30
GEMM_SIZE = 2048


def read_contenders() -> dict[str, Contender]:
    """Plain reads of 1 GiB: vector loads, torch.sum over a flat tensor and over rows."""
    from pykvcache import _C

    flat = torch.ones(READ_BYTES // 4)
    rows = flat.view(2**14, -1)
    addresses = rows.data_ptr() + np.arange(len(rows), dtype=np.int64) * rows[0].nbytes
    regions = addresses.tobytes()
    return {
        "read loads": lambda _: _C.read_regions(regions, rows[0].nbytes),
        "read flat": lambda _: flat.sum(),
        "read rows": lambda _: rows.sum(1),
    }


def block_reader(storage: Tensor, tables: Tensor) -> Contender:
    """Vector loads of the blocks that tables[call] names, in that order.

    Args:
        storage: [num_blocks, elements of K and V of a block].
        tables: int32 [copies, B, blocks].
    """
    from pykvcache import _C

    width = storage[0].nbytes
    regions = [
        (storage.data_ptr() + table.flatten().numpy().astype(np.int64) * width).tobytes()
        for table in tables
    ]
    return lambda call: _C.read_regions(regions[call % len(regions)], width)


def gemm_contenders(dtype: torch.dtype) -> dict[str, Contender]:
    """torch.mm of two square matrices of GEMM_SIZE."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    return {"gemm": lambda _: torch.mm(a, b, out=out)}


def read_bandwidth(timings: Mapping[str, Timing]) -> float:
    """Bytes a second of the best plain read, by its median."""
    return READ_BYTES / min(t.median for name, t in timings.items() if name.startswith("read "))


def gemm_rate(timings: Mapping[str, Timing]) -> float:
    """FLOP a second of the matrix multiply, by its median."""
    return 2 * GEMM_SIZE**3 / timings["gemm"].median
