"""Contiguous regions: they never overlap, and all of the memory comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvcache.bench.replay.regions import Buddies, FirstFit, FixedSlots


@pytest.mark.parametrize(
    "make", [lambda: FixedSlots(96, 20), lambda: FirstFit(96), lambda: Buddies(96, 20, False)]
)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_regions_never_overlap_and_all_come_back(make, data: st.DataObject) -> None:
    regions = make()
    taken: dict[int, int] = {}
    for size in data.draw(st.lists(st.integers(1, 20), max_size=40)):
        if taken and data.draw(st.booleans()):
            address = data.draw(st.sampled_from(sorted(taken)))
            regions.give(address, taken.pop(address))
        address = regions.take(size)
        if address is not None:
            taken[address] = size
            spans = sorted((a, a + regions.granted(s)) for a, s in taken.items())
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            assert spans[-1][1] <= 96
    for address, size in taken.items():
        regions.give(address, size)
    largest = regions.largest()
    assert sum(1 for _ in iter(lambda: regions.take(largest), None)) == 96 // largest


@given(st.integers(1, 300), st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_buddies_use_the_whole_memory(slots: int, longest: int) -> None:
    """Single slots fill it, and when they are given back, its first regions are there again."""
    regions, fresh = Buddies(slots, longest, True), Buddies(slots, longest, True)
    taken = [regions.take(1) for _ in range(slots)]
    assert sorted(taken) == list(range(slots)) and regions.take(1) is None
    for address in taken:
        regions.give(address, 1)
    size = fresh.largest()
    while size:
        address = fresh.take(size)
        assert regions.take(size) == address
        size = size // 2 if address is None else size
