"""Linear layers in bfloat16 on a CPU, of so few rows as a decode step has.

A matrix multiply packs the weights in every call, which for few rows costs as much as the product.
While a step runs, the plain `nn.Linear` layers of the model go to a kernel that reads the weights
as they lie; nothing is copied, so changed weights are used at once.

Read next: csrc/cpu/kernels/linear.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pykvcache import ops

INPUTS = 32  # of which the kernel takes multiples

Forward = Callable[[Tensor], Tensor]


class Linears:
    """Inside a with block the layers of a model use the kernel where it takes the call.

    Others, calls of more rows, with gradients, under autocast or being compiled, are what they
    were. Blocks of several threads may overlap.
    """

    def __init__(self, model: nn.Module) -> None:
        most = _most_rows()
        found = [module for module in model.modules() if most and _serves(module)]
        self._forwards = [(module.__dict__, _forward(module, most)) for module in found]

    def __enter__(self) -> None:
        for attributes, forward in self._forwards:
            attributes.setdefault("forward", forward)

    def __exit__(self, *_: object) -> None:
        for attributes, forward in self._forwards:
            if attributes.get("forward") is forward:
                del attributes["forward"]


def _most_rows() -> int:
    """Rows that the kernel takes on this processor."""
    if ops.backends()["cpu"] != "ready":
        return 0
    from pykvcache import _C

    return _C.linear_rows()


def _serves(module: nn.Module) -> bool:
    """Whether the layer is a plain one in bfloat16; subclasses may do anything."""
    return type(module) is nn.Linear and _takes(module.weight) and module.in_features % INPUTS == 0


def _takes(x: Any) -> bool:
    plain = type(x) is Tensor or type(x) is nn.Parameter
    return plain and x.dtype is torch.bfloat16 and x.is_cpu and x.is_contiguous()


def _forward(module: Any, most: int) -> Forward:
    """The forward of a layer; its parameters are looked up in each call."""
    from pykvcache import _C

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        outputs, inputs = weight.shape
        rows = x.numel() // inputs
        if (
            not 0 < rows <= most
            or x.shape[-1] != inputs
            or torch.is_grad_enabled()
            or not (_takes(x) and _takes(weight) and (bias is None or _takes(bias)))
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return linear(x, weight, bias)
        out = x.new_empty((*x.shape[:-1], outputs))
        bias_address = 0 if bias is None else bias.data_ptr()
        _C.linear(
            x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr(), rows, inputs, outputs
        )
        return out

    return forward
