"""Lazy attention masks: a description of the mask in place of a [B, 1, T, KV] tensor.

transformers asks the registered mask function for a mask once per forward and kind of layer. Where
the mask is plain (causal, or causal within a window or a chunk, plus 2D padding) we return a
`LazyMask` that says so and is only built when someone reads it. Every other mask, and every mask
while gradients are recorded or torch.compile traces, is the stock one.

Read next: pykvcache/hf/rows.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

from pykvcache.hf.counters import counters
from pykvcache.hf.handles import LazyTensor


class LazyMask(LazyTensor):
    """A plain mask [B, 1, T, KV]: causal, within a window or a chunk, plus padding.

    `limits` are (window, chunk), 0 = none; `padding` is the 2D mask [B, tokens seen] or None.
    """

    spec: dict[str, Any]
    limits: tuple[int, int]
    padding: Tensor | None
    _build: Callable[..., Tensor | None]
    _dense: Tensor | None
    _left_out: bool | None

    @staticmethod
    def __new__(
        cls, spec: dict[str, Any], build: Callable[..., Tensor | None], limits: tuple[int, int]
    ) -> LazyMask:
        shape = (spec["batch_size"], 1, spec["q_length"], spec["kv_length"])
        dtype = torch.bool if build is sdpa_mask else spec["dtype"]
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=spec["device"])
        mask.spec, mask._build, mask._dense, mask._left_out = spec, build, None, None
        mask.limits, mask.padding = limits, spec["attention_mask"]
        return mask

    def __init__(self, *args: Any) -> None:
        """Everything is set in `__new__`."""

    def dense(self) -> Tensor:
        """The mask as a tensor, built once: bool (True = may attend), or float for eager."""
        if self._dense is None:
            counters.masks += 1
            spec = {
                **self.spec,
                "allow_is_causal_skip": False,
                "allow_is_bidirectional_skip": False,
            }
            mask = self._build(**spec)
            assert mask is not None
            self._dense = mask.expand(self.shape[0], -1, -1, -1)
        return self._dense

    def stock(self) -> Tensor | None:
        """What the stock mask function would have returned: None where `is_causal` says enough."""
        return self._build(**self.spec)

    @property
    def is_left_out(self) -> bool:
        """Whether the stock mask is None: then a module that is not causal sees all positions."""
        if self._left_out is None:
            self._left_out = self.stock() is None
        return self._left_out


def _local_limits(config: Any, local_size: int | None) -> tuple[int, int] | None:
    """(window, chunk) of a mask with this `local_size`; None when the config leaves it open."""
    if local_size is None:
        return 0, 0
    is_chunk = getattr(config, "attention_chunk_size", None) == local_size
    is_window = getattr(config, "sliding_window", None) == local_size
    if is_chunk == is_window:
        return None
    return (0, local_size) if is_chunk else (local_size, 0)


def _mask_function(build: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def mask(*, allow_is_causal_skip: bool = False, **spec: Any) -> Tensor | None:
        spec["allow_is_causal_skip"] = allow_is_causal_skip
        if torch.compiler.is_compiling() or not allow_is_causal_skip or torch.is_grad_enabled():
            return build(**spec)
        if isinstance(spec["q_offset"], Tensor):
            return build(**spec)
        local_size = spec.get("local_size")
        if local_size is None and spec["q_length"] == 1 and spec.get("attention_mask") is None:
            return None
        limits = _local_limits(spec.get("config"), local_size)
        if limits is None:
            return build(**spec)
        return LazyMask(spec, build, limits)

    return mask


lazy_sdpa_mask = _mask_function(sdpa_mask)
lazy_eager_mask = _mask_function(eager_mask)


def align_columns(mask: Tensor, start: int, pads: Tensor | None, kv_len: int) -> Tensor:
    """A mask or bias over the columns of a handle, as one over stored positions.

    Args:
        mask: bool or float [B | 1, HQ | 1, T, n]; column j is padded position start + j.
        start: padded position of the first column.
        pads: int64 [B], leading padding of each row that is not stored; None = none anywhere.
        kv_len: longest stored length.

    Returns:
        [B | 1, HQ | 1, T, kv_len]; column j is stored position j. Positions that the mask has no
        column for are masked.
    """
    masked = False if mask.dtype == torch.bool else -torch.inf
    if pads is None:
        return mask if start == 0 else torch.nn.functional.pad(mask, (start, 0), value=masked)
    column = torch.arange(kv_len, device=mask.device) + pads[:, None] - start  # [B, kv_len]
    known = (column >= 0) & (column < mask.shape[3])
    batch, (_, heads, tokens, columns) = len(pads), mask.shape
    index = column.clamp(0, columns - 1)[:, None, None].expand(-1, heads, tokens, -1)
    aligned = mask.expand(batch, -1, -1, -1).gather(3, index)
    return aligned.masked_fill(~known[:, None, None], masked)
