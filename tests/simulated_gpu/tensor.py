"""A tensor whose device is "cuda:0" and whose values lie in a tensor on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda", 0)


class DeviceTensor(Tensor):
    """What `torch.empty(..., device="cuda")` gives.

    Attributes:
        host: the values; shares its storage with the `host` of views.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        wrapper: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
            requires_grad=host.requires_grad,
        )
        wrapper.host = host.detach() if host.requires_grad else host
        return wrapper

    def __init__(self, host: Tensor) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in KNOWN for kind in types):
            return NotImplemented  # a subclass of the code under test comes first
        raise RuntimeError(f"{func}: a tensor of the simulated GPU outlived it, or met a thread")

    def __repr__(self, **kwargs: Any) -> str:
        return f"DeviceTensor({self.host})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        copy = DeviceTensor(self.host.clone())
        memo[id(self)] = copy
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return copy


KNOWN = (Tensor, DeviceTensor, torch.nn.Parameter)


def to_host(tree: Any) -> Any:
    """The same structure with the values of device tensors."""
    return tree_map_only(DeviceTensor, lambda x: x.host, tree)


def to_device(tree: Any) -> Any:
    """The same structure with CPU tensors as device tensors."""

    def wrap(x: Tensor) -> DeviceTensor:
        return x if isinstance(x, DeviceTensor) else DeviceTensor(x)

    return tree_map_only(Tensor, wrap, tree)
