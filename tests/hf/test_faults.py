"""The identity check can fail: each part that it guards, broken on purpose, is caught."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from families import make_model
from test_identity import assert_same
from torch import Tensor
from ways import WAYS

import pykvcache
from pykvcache import ops
from pykvcache.cache import KVPool
from pykvcache.hf.rows import Rows


def no_copy_on_write(self: KVPool, group: int, pairs: Tensor) -> None:
    """The block that a row gets for its own holds nothing of the shared one.

    It is wiped, because fresh memory may still hold the right values from an earlier run.
    """
    for storage in self._storages:
        storage[pairs[:, 1]] = 0


def no_reordering(self: Rows, index: list[int]) -> None:
    """Beams keep their own past whatever was selected."""


def padding_is_stored(self: Rows, mask: Tensor | None) -> None:
    """Padding is said to be handled but is neither dropped nor masked."""
    if mask is not None:
        self._announced = mask.shape[1]


def rejected_tokens_stay(self: Rows, remove: int) -> None:
    """Positions are taken back, stored tokens are not."""
    self.seen -= remove


FAULTS = [
    ("llama", "beam_search", KVPool, "copy_blocks", no_copy_on_write),
    ("gemma3", "beam_search", KVPool, "copy_blocks", no_copy_on_write),
    ("llama", "branched", KVPool, "copy_blocks", no_copy_on_write),
    ("llama", "beam_search", Rows, "select", no_reordering),
    ("gemma3", "beam_sampling", Rows, "select", no_reordering),
    ("t5", "beam_search", Rows, "select", no_reordering),
    ("llama", "greedy", Rows, "announce", padding_is_stored),
    ("gpt2", "logits", Rows, "announce", padding_is_stored),
    ("llama4", "chunked_prefill", Rows, "announce", padding_is_stored),
    ("llama", "assisted", Rows, "crop", rejected_tokens_stay),
    ("gemma3", "prompt_lookup", Rows, "crop", rejected_tokens_stay),
]


@pytest.mark.parametrize(("family", "way", "owner", "name", "fault"), FAULTS)
def test_fault_is_caught(
    family: str,
    way: str,
    owner: type,
    name: str,
    fault: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    model = copy.deepcopy(make_model(family))
    expected = WAYS[way](model)
    pykvcache.patch(model, block_size=4, backend=backend)
    assert_same(WAYS[way](model), expected)
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        assert_same(WAYS[way](model), expected)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "cohere2", "llama4"])
def test_ignored_window_is_caught(
    family: str, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """A kernel that sees past the window or chunk changes the result."""
    model = copy.deepcopy(make_model(family))
    expected = WAYS["greedy"](model)
    pykvcache.patch(model, block_size=16, backend=backend)
    table = ops.table(backend, "cpu")
    attend = table.paged_attention

    def no_limits(*args: Any) -> tuple[Tensor, Tensor]:
        return attend(*args[:9], 0, 0, *args[11:])

    monkeypatch.setattr(table, "paged_attention", no_limits)
    with pytest.raises(AssertionError):
        assert_same(WAYS["greedy"](model), expected)
