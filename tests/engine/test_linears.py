"""Linear layers of few rows in bfloat16: the kernel, and lending it to a model during a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pykvcache
from pykvcache import _C
from pykvcache.bench.models import build_llama
from pykvcache.engine.linears import Linears

MOST = _C.linear_rows()
needs_kernel = pytest.mark.skipif(MOST == 0, reason="the processor has no bfloat16 products")
BF16 = torch.bfloat16


def layer(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias).to(BF16)


@torch.no_grad()
def called(module: nn.Linear, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a call inside the block is the kernel's, and that it is right."""
    calls = []
    with monkeypatch.context() as patch:
        kernel = _C.linear
        patch.setattr(_C, "linear", lambda *args: calls.append(kernel(*args)))
        with Linears(module):
            out = module(x)
    expected = x.double() @ module.weight.double().T
    if module.bias is not None:
        expected += module.bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=8e-3, atol=8e-3)
    return bool(calls)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"),
    [(32, 1, True), (64, 17, False), (96, 16, True), (512, 128, False), (1536, 515, True)],
)
def test_outputs_are_right(
    monkeypatch: pytest.MonkeyPatch, inputs: int, outputs: int, bias: bool, threads: int
) -> None:
    module = layer(inputs, outputs, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 2, 3, 4, 5, 8, 11, 12, 13, 16, 17, 32, 33, 47, 49, 63, 64):
            if rows <= MOST:
                assert called(module, torch.randn(rows, inputs).to(BF16), monkeypatch)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_nothing_beside_the_output_is_written() -> None:
    weight, memory = torch.randn(17, 64).to(BF16), torch.full((3, 100), 7.0).to(BF16)
    for rows in (1, 12, 13, min(40, MOST)):
        x, out = torch.randn(rows, 64).to(BF16), torch.full((rows + 2, 17), 7.0).to(BF16)
        inner = out[1:-1]
        addresses = (x.data_ptr(), weight.data_ptr(), 0, inner.data_ptr())
        _C.linear(*addresses, rows, 64, 17)
        assert (out[0] == 7).all() and (out[-1] == 7).all() and (inner != 7).all()
    assert (memory == 7).all()


@needs_kernel
def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    module, x = layer(64, 20), torch.randn(5, 64).to(BF16)
    x[2, 3] = torch.nan
    with torch.no_grad(), Linears(module):
        bad = module(x).isnan().any(1)
    assert bad.tolist() == [False, False, True, False, False]


@needs_kernel
@pytest.mark.parametrize("sizes", [(0, 64, 16), (MOST + 1, 64, 16), (1, 48, 16), (1, 64, 0)])
def test_other_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="linear takes 1 to"):
        _C.linear(0, 0, 0, 0, *sizes)


@needs_kernel
def test_calls_that_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(64, 48, bias=True), torch.randn(4, 64).to(BF16)
    assert called(module, x, monkeypatch)
    assert called(module, x.view(2, 2, 64), monkeypatch)
    assert not called(module, torch.randn(MOST + 1, 64).to(BF16), monkeypatch)
    assert not called(module, torch.randn(64, 4).to(BF16).T, monkeypatch)
    assert not called(layer(48, 8), torch.randn(4, 48).to(BF16), monkeypatch)
    with torch.autocast("cpu", BF16):
        assert not called(module, x, monkeypatch)
    with Linears(module):
        module(x).float().sum().backward()
        with pytest.raises(RuntimeError, match="shape"):
            module(torch.randn(4, 32).to(BF16))
    assert module.weight.grad is not None


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@needs_kernel
@torch.no_grad()
def test_layers_that_are_not_plain_stay_as_they_were() -> None:
    own = layer(64, 16)
    own.forward = lambda x: x + 1  # type: ignore[method-assign]
    model = nn.ModuleList([Doubled(64, 16).to(BF16), own, nn.Linear(64, 16)])
    before = [dict(module.__dict__) for module in model]
    with Linears(model):
        assert [module.__dict__ for module in model] == before
    assert [module.__dict__ for module in model] == before


@needs_kernel
@torch.no_grad()
def test_changed_weights_and_hooks_count_at_once() -> None:
    module, x = layer(64, 16), torch.ones(1, 64).to(BF16)
    linears, seen = Linears(module), []
    module.register_forward_hook(lambda *_: seen.append(1))
    with linears:
        module.weight.fill_(1)
        assert (module(x) == 64).all()
        module.weight.data = torch.full((16, 64), 2.0).to(BF16)
        assert (module(x) == 128).all()
        module.weight = nn.Parameter(torch.full((8, 64), 3.0).to(BF16))
        assert module(x).tolist() == [[192.0] * 8]
        module.float()
        assert module(x.float()).dtype == torch.float32
    assert len(seen) == 4


@needs_kernel
def test_blocks_may_overlap_and_fail() -> None:
    module = layer(64, 16)
    first, second = Linears(module), Linears(module)
    with pytest.raises(ZeroDivisionError), first:
        1 / 0  # noqa: B018
    assert "forward" not in module.__dict__
    first.__enter__()
    second.__enter__()
    first.__exit__()
    with torch.no_grad():
        assert module(torch.ones(1, 64).to(BF16)).shape == (1, 16)
    second.__exit__()
    assert "forward" not in module.__dict__


def test_the_engine_gives_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probabilities of both ways differ by rounding; the model is as it was."""
    model = build_llama(64, 96, 2, 4, 2, 500, BF16)
    completions = [[4, 5, 6, 7, 8], [9]]

    def logprobs() -> Tensor:
        engine = pykvcache.Engine(model, num_blocks=50)
        scores = engine.score(list(range(20)), completions)
        return torch.tensor([value for score in scores for value in score.logprobs])

    fast = logprobs()
    assert not any("forward" in module.__dict__ for module in model.modules())
    monkeypatch.setattr("pykvcache.engine.linears._most_rows", lambda: 0)
    torch.testing.assert_close(fast, logprobs(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("isa", ["avx512", "portable"])
def test_other_processors_have_no_such_kernel(isa: str) -> None:
    code = "import torch; from pykvcache import _C; print(_C.linear_rows())"
    environment = os.environ | {"PYKVCACHE_CPU_ISA": isa}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
