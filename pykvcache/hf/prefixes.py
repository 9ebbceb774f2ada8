"""Prefixes that a patched model finds again in later `generate` calls.

All caches of the model share one pool. Every forward that has ended notes its tokens, and the next
call begins with the blocks of the longest prefix that all rows of its batch have in the pool;
transformers then computes the rest, as it does for a cache that is continued. Only what depends on
the tokens alone is kept: a forward with images, embeddings, a mask that is not left padding or
unusual positions is not. When the weights change, everything is forgotten.

Read first: pykvcache/hf/notes.py. Read next: pykvcache/hf/state.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pykvcache.batch import Int64Array
from pykvcache.cache import KVPool
from pykvcache.hf.cache import PagedCache
from pykvcache.hf.rows import Rows
from pykvcache.weights import Fingerprint

# Arguments of a forward that say nothing about keys and values but what is checked.
PLAIN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "labels",
}


class SharedPrefixes:
    """The pool that the caches of one model share, and the weights that filled it.

    Copies of a model begin with a pool of their own.
    """

    def __init__(self) -> None:
        self.pool: KVPool | None = None
        self._kind: tuple[torch.dtype, torch.device] | None = None
        self._weights: Fingerprint | None = None

    def __reduce__(self) -> tuple[type[SharedPrefixes], tuple[()]]:
        return SharedPrefixes, ()

    def check(self, model: Any) -> None:
        """Before a new cache: forget what other weights have computed."""
        kind, weights = (model.dtype, model.device), Fingerprint(model)
        if kind != self._kind:
            self.pool = None
        elif self.pool is not None and self.pool.allocator is not None:
            assert self._weights is not None
            if not weights.same(self._weights):
                self.pool.allocator.forget_prefixes()
        self._kind, self._weights = kind, weights

    def begin(self, cache: Any, ids: Tensor, arguments: dict[str, Any]) -> None:
        """Let a fresh cache start with what it has in common with earlier ones.

        Args:
            cache: that `generate` will use.
            ids: [B, T] prompts, padded on the left.
            arguments: that `generate` will give to the model's forward.
        """
        if type(cache) is not PagedCache or cache.rows.notes is None or cache.rows.seen > 0:
            return
        rows = cache.rows
        if rows.pool.allocator is None or rows.recording or not is_plain(arguments):
            return
        pads = _padding(arguments.get("attention_mask"), ids)
        if pads is None or not _is_usual(arguments.get("position_ids"), pads, ids.shape[1]):
            return
        if any(pads) and rows.pool.read_by_others:  # the padding has to be computed and stored
            return
        seqs, seen = _share(rows, ids.cpu().numpy(), pads)
        if seqs is not None:
            rows.begin_with(seqs, seen, pads)
            cache.begin_layers(seen)


def note(cache: PagedCache, arguments: dict[str, Any], training: bool) -> None:
    """Note the tokens of a forward that has ended, given all its arguments."""
    rows = cache.rows
    if rows.notes is None or rows.notes.end < 0:
        return
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    positions = arguments.get("position_ids")
    plain = is_plain(arguments) and not training and isinstance(ids, Tensor) and ids.dim() == 2
    if isinstance(mask, Tensor) and not rows.announced:
        plain = False
    if positions is None and rows.pads is not None and "position_ids" in arguments:
        plain = False
    if isinstance(positions, Tensor) and positions.dim() != 2:
        plain = False
    if not plain or ids is None:
        rows.notes.stop()
    elif rows.notes.add(ids, positions, rows.seen):
        rows.record()


def is_plain(arguments: dict[str, Any]) -> bool:
    """Whether tokens, padding and positions are all that a forward is given."""
    return all(value is None or name in PLAIN for name, value in arguments.items())


def _padding(mask: Any, ids: Tensor) -> list[int] | None:
    """Left padding of each row, or None if the mask is something else."""
    if mask is None:
        return [0] * len(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    real = (mask != 0).cpu().numpy()
    pads: Int64Array = ids.shape[1] - real.sum(1)
    return pads.tolist() if (real == (np.arange(ids.shape[1]) >= pads[:, None])).all() else None


def _is_usual(positions: Any, pads: list[int], tokens: int) -> bool:
    if positions is None:
        return not any(pads)
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    usual = np.arange(tokens) - np.asarray(pads)[:, None]
    if positions.shape[1] != tokens:
        return False
    given = positions.expand(len(pads), tokens).cpu().numpy()
    return bool(((given == usual) | (usual < 0)).all())


def _share(rows: Rows, ids: Int64Array, pads: list[int]) -> tuple[Int64Array | None, int]:
    """Sequences with the longest prefix that all rows have, and its padded length.

    The last token is always computed, for its logits.
    """
    allocator, seen = rows.allocator, ids.shape[1] - 1
    while seen > min(pads):
        prompts = [row[min(pad, seen) : seen] for row, pad in zip(ids, pads, strict=True)]
        seqs, hits = allocator.allocate_cached(prompts)
        seen = min(seen, int((np.asarray(pads) + hits).min()))
        lengths = np.maximum(seen - np.asarray(pads), 0)
        if lengths.any() and ((hits == lengths).all() or not any(rows.windows)):
            allocator.truncate(seqs, lengths)
            return seqs, seen
        allocator.free(seqs)  # a shorter prefix needs other blocks of its window
    return None, 0
