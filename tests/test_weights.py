"""Fingerprint: what counts as a change of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pykvcache.engine.guard import WeightsGuard
from pykvcache.weights import Fingerprint


class Rotary(nn.Module):
    """Frequencies as transformers keeps them; a forward writes them anew, or puts others there."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / torch.arange(1, 9) / factor, persistent=False)
        self.register_buffer("original_inv_freq", self.inv_freq.clone(), persistent=False)

    def forward(self) -> None:
        self.inv_freq.copy_(self.original_inv_freq)
        self.inv_freq = self.inv_freq.clone()


class Adapter(nn.Linear):
    """What peft's layers say of themselves."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self._disable_adapters, self._active_adapter = False, ["default"]
        self.merged_adapters: list[str] = []
        self.scaling = {"default": 1.0}


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
    module.rotary, module.adapter = Rotary(), Adapter()
    return module.eval()


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


def frequencies_in_place(module: nn.Module) -> None:
    module.rotary.inv_freq[2].mul_(0.5)


def other_frequencies(module: nn.Module) -> None:
    module.rotary.inv_freq = module.rotary.inv_freq / 4


def other_module(module: nn.Module) -> None:
    module.rotary = Rotary(4.0)


def other_parameter(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight + 1)


def one_more(module: nn.Module) -> None:
    module[1] = nn.Sequential(module[1], nn.Linear(8, 8))


def adapter_off(module: nn.Module) -> None:
    module.adapter._disable_adapters = True


def other_adapter(module: nn.Module) -> None:
    module.adapter._active_adapter = ["other"]


def scaled_adapter(module: nn.Module) -> None:
    module.adapter.scaling["default"] = 2.0


def training_mode(module: nn.Module) -> None:
    module[1].train()


CHANGES: list[Callable[[nn.Module], None]] = [
    in_place,
    through_data,
    other_tensor,
    buffer,
    other_dtype,
    frequencies_in_place,
    other_frequencies,
    other_module,
    other_parameter,
    one_more,
    adapter_off,
    other_adapter,
    scaled_adapter,
    training_mode,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change: Callable[[nn.Module], None]) -> None:
    module = model()
    before = Fingerprint(module)
    assert Fingerprint(module).same(before)
    change(module)
    assert not Fingerprint(module).same(before)
    assert Fingerprint(module).same(Fingerprint(module))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_one_until_it_is_accepted(change: Callable[[nn.Module], None]) -> None:
    module = model()
    guard = WeightsGuard(module)
    assert not guard.changed(thorough=True)
    with torch.no_grad():
        change(module)
    assert guard.changed(thorough=True) and guard.changed(thorough=True)
    through_views = (through_data, frequencies_in_place, other_frequencies)
    assert guard.changed(thorough=False) == (change not in through_views)
    guard.accept()
    assert not guard.changed(thorough=True)


def test_frequencies_that_a_forward_writes_are_no_change() -> None:
    module = model()
    guard = WeightsGuard(module)
    module.rotary()
    assert not guard.changed(thorough=True)


def test_a_list_that_is_not_complete_any_more_is_made_anew() -> None:
    module = model()
    guard = WeightsGuard(module)
    module.register_buffer("nothing", None)  # another list, the same weights
    assert not guard.changed(thorough=False)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert guard.changed(thorough=False)


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


@pytest.mark.parametrize("shape", [(1024, 512), (96, 64), (512, 1376), (8, 64, 48), (3, 4000)])
def test_writes_through_data_to_a_band_of_rows_or_columns_are_noticed(
    shape: tuple[int, ...],
) -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.randn(shape)))
    guard = WeightsGuard(module)
    for dim, size in enumerate(shape):
        width = -(-size // 50)
        for begin in range(0, size - width + 1, width):
            band = module.weight.data.narrow(dim, begin, width)
            old = band.clone()
            band.neg_()
            assert not guard.changed(thorough=False)
            assert guard.changed(thorough=True), (dim, begin, width)
            band.copy_(old)
            assert not guard.changed(thorough=True)
    module.weight.data.flatten()[-1] += 1  # a token that was added to an embedding
    assert guard.changed(thorough=True)
