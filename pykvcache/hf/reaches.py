"""What the masks of a model let each layer see, noted while it runs once.

A cache layer has a window of its own, which need not be that of the mask: the stock cache of Moshi
forgets what its mask shows.

Read next: pykvcache/hf/packed.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

LATER = -1  # the reach of a mask that shows a token what follows it
Reaches = dict[int, int | None]  # by layer: window or chunk, 0 = all positions, None = not known

_noted: ContextVar[Reaches | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[Reaches]:
    """Note the reach of every layer that attends inside the with block, in this thread."""
    reaches: Reaches = {}
    token = _noted.set(reaches)
    try:
        yield reaches
    finally:
        _noted.reset(token)


def noting(
    usual: Callable[..., Tensor | None], stock: Callable[..., Tensor]
) -> Callable[..., Tensor | None]:
    """A mask function that is `usual`, but inside `noted` builds masks that know their reach."""

    def mask(**spec: Any) -> Tensor | None:
        if _noted.get() is None:
            return usual(**spec)
        always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        built: Any = stock(**{**spec, **always})
        built.reach = LATER if _shows_later(built, spec) else spec.get("local_size") or 0
        return built  # type: ignore[no-any-return]

    return mask


def _shows_later(mask: Tensor, spec: dict[str, Any]) -> bool:
    """Whether a mask [B, 1, T, KV], bool or for eager float, lets a token see a later one."""
    shown = mask if mask.dtype == torch.bool else mask == 0
    return bool(shown.triu(spec["q_offset"] - spec["kv_offset"] + 1).any())


def note(module: nn.Module, mask: Tensor | None) -> None:
    """An attention module attends with this mask."""
    reaches = _noted.get()
    index = getattr(module, "layer_idx", None)
    if reaches is not None and isinstance(index, int):
        reaches[index] = 0 if mask is None else getattr(mask, "reach", None)
