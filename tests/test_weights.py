"""Fingerprint: what counts as a change of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pykvcache.weights import Fingerprint


def model() -> nn.Module:
    """Parameters and buffers of unlike dtypes and shapes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8).bfloat16())
    module.register_buffer("scalar", torch.tensor(1.0))
    module.register_buffer("flag", torch.tensor(True))
    module.register_buffer("empty", torch.empty(0))
    module.register_buffer("nan", torch.full((3,), torch.nan))
    module.register_parameter("turned", nn.Parameter(torch.randn(6, 4).t()))
    module.register_buffer("small", torch.randn(4, 4).to(torch.float8_e4m3fn))
    return module


def in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module[0].weight[3, 3] += 1


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(2)


def other_tensor(module: nn.Module) -> None:
    module[1].bias.data = module[1].bias.data + 1


def buffer(module: nn.Module) -> None:
    module.scalar.fill_(2)


def other_dtype(module: nn.Module) -> None:
    module[0].to(torch.float64)


CHANGES: list[Callable[[nn.Module], None]] = [
    in_place,
    through_data,
    other_tensor,
    buffer,
    other_dtype,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change: Callable[[nn.Module], None]) -> None:
    module = model()
    before = Fingerprint(module)
    assert Fingerprint(module).same(before)
    change(module)
    assert not Fingerprint(module).same(before)
    assert Fingerprint(module).same(Fingerprint(module))


def test_inference_tensors_are_compared_by_content() -> None:
    with torch.inference_mode():
        module = nn.Linear(4, 4)
    before = Fingerprint(module)
    assert Fingerprint(module).same(before)
    with torch.inference_mode():
        module.weight.mul_(2)
    assert not Fingerprint(module).same(before)


def test_tensors_without_plain_memory_count_as_changed() -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    assert not Fingerprint(module).same(Fingerprint(module))
