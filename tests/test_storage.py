"""Storages of blocks ask for huge pages, and for nothing outside of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pykvcache import ops
from pykvcache.storage import allocate

SMAPS = Path("/proc/self/smaps")
HUGE_PAGE = 2 << 20

pytestmark = pytest.mark.skipif(ops.backends()["cpu"] != "ready", reason="_C is not built")


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head:
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.skipif(not SMAPS.exists(), reason="needs /proc")
def test_huge_pages_are_asked_for() -> None:
    storage = allocate(64, HUGE_PAGE // 4, torch.float32, torch.device("cpu"))
    inside = (storage.data_ptr() + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE
    if "nh" in flags_at(inside):
        pytest.skip("this system gives no huge pages")
    assert "hg" in flags_at(inside)
    assert storage.shape == (64, HUGE_PAGE // 4)


def test_small_storages_are_left_alone() -> None:
    from pykvcache import _C

    storage = allocate(4, 16, torch.float32, torch.device("cpu"))
    assert _C.prefer_huge_pages(storage.data_ptr(), storage.nbytes) is False
    assert allocate(4, 16, torch.float32, torch.device("meta")).shape == (4, 16)
