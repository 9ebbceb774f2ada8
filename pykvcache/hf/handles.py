"""Lazy keys and values: what `PagedCache.update` returns in place of dense tensors.

A handle has the shape, dtype and device that transformers expects and no data. Our attention
function reads the blocks behind it; any other code that touches it (repeat_kv, cat, a model's own
matmul) gets dense keys or values [B, HKV, S, D] gathered from the blocks: slow, but right, and
counted.

Read next: pykvcache/hf/masks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pykvcache.hf.counters import counters

if TYPE_CHECKING:
    from pykvcache.hf.layer import PagedLayer


class LazyTensor(torch.Tensor):
    """A tensor without data that becomes dense when an operator touches it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """The tensor that this one stands for."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def resolve(x: Any) -> Any:
            return x.dense() if isinstance(x, LazyTensor) else x

        if func.overloadpacket is torch.ops.aten.to and _changes_nothing(args, kwargs or {}):
            return args[0]  # in inference mode also such a call comes here
        return func(*tree_map(resolve, args), **tree_map(resolve, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"


def _changes_nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `to` with these arguments names the device and dtype that the tensor has."""
    tensor = args[0]
    for wanted in (*args[1:], *kwargs.values()):
        other = isinstance(wanted, Tensor)
        device = wanted.device if other else wanted if isinstance(wanted, torch.device) else None
        dtype = wanted.dtype if other else wanted if isinstance(wanted, torch.dtype) else None
        if device not in (None, tensor.device) or dtype not in (None, tensor.dtype):
            return False
    return True


class PagedKeys(LazyTensor):
    """Keys of the last positions of a layer up to `end`, [B, HKV, length, D]; see `make_handle`."""

    layer: PagedLayer
    end: int
    source: Tensor | None = None  # new keys or values that need a gradient, which there is none for
    side = 0
    _dense: Tensor | None = None

    def dense(self) -> Tensor:
        """Gathered once, kept while the handle lives; padding that is not stored is zero."""
        if self._dense is None:
            counters.gathered += 1
            self._dense = self.layer.gather(self.end - self.shape[2], self.end)[self.side]
        return self._dense


class PagedValues(PagedKeys):
    """Values of the last positions of a layer up to `end`, [B, HKV, length, Dv]."""

    side = 1


def make_handle(
    kind: type[PagedKeys], layer: PagedLayer, end: int, shape: tuple[int, ...]
) -> PagedKeys:
    """A handle of `shape` on the padded positions of `layer` that end at `end`."""
    handle = wrap(kind, shape, dtype=layer.dtype, device=layer.device)
    handle.layer, handle.end = layer, end
    return handle  # type: ignore[no-any-return]


wrap: Any = torch.Tensor._make_wrapper_subclass
