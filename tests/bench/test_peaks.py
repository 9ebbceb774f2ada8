"""What bandwidth is measured with: every contender reads the bytes that it is said to read."""

from __future__ import annotations

import pytest
import torch

from pykvcache.bench import peaks


def test_block_reader_reads_the_blocks_of_its_call() -> None:
    storage = torch.arange(8 * 256, dtype=torch.float32).view(8, 256)
    tables = torch.tensor([[[5, 2]], [[0, 7]]], dtype=torch.int32)
    read = peaks.block_reader(storage, tables)
    for call in range(3):
        assert read(call) == storage[tables[call % 2].flatten()].sum().item()


def test_read_contenders_read_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "READ_BYTES", 2**22)
    for read in peaks.read_contenders().values():
        assert float(torch.as_tensor(read(0)).sum()) == 2**20
