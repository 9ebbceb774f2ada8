"""What only a GPU can show of backend "cuda": graphs, streams, and that no operator waits.

The case table runs there too: test_paged_attention.py, test_cache_ops.py, test_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import BF16, Case, build
from torch import Tensor

from pykvcache import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if ops.backends()[request.param] != "ready":
        pytest.skip(ops.backends()[request.param])
    return str(request.param)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where a CUDA call would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    data = build(case)

    def move(x: Any) -> Any:
        return x.cuda() if isinstance(x, Tensor) else x

    return tuple(map(move, data.args)), {name: move(x) for name, x in data.kwargs.items()}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_no_operator_waits_for_the_gpu(backend: str, dtype: torch.dtype) -> None:
    args, kwargs = on_gpu(Case("waits", rows=((1, 70), (20, 60)), dtype=dtype))
    _, k_cache, v_cache, table, lengths, starts, longest = args
    plan = ops.plan(lengths, starts, longest, 4, 2, 64, backend=backend)
    ops.paged_attention(*args, **kwargs, plan=plan, backend=backend)
    slots = ops.slot_mapping(table, lengths, starts, 21, 16, backend=backend)
    k = torch.zeros(21, 2, 64, dtype=dtype, device="cuda")
    ops.write_kv(k, k, k_cache, v_cache, slots, backend=backend)
    key_starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ops.gather_kv(k_cache, v_cache, table, lengths, key_starts, 130, backend=backend)


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_graph_decodes_many_steps(backend: str, deterministic: bool) -> None:
    """Slots, write, plan and attention are replayed while lengths grow on the device."""
    rows, heads, dim, block_size, first = 3, 2, 64, 16, torch.tensor([5, 40, 0])
    generator = torch.Generator(device="cuda").manual_seed(0)
    pools = [
        torch.full((30, heads, block_size, dim), torch.nan, dtype=BF16, device="cuda")
        for _ in range(2)
    ]
    table = torch.randperm(30, device="cuda", generator=generator).int().reshape(rows, 10)
    lengths, starts = first.int().cuda(), torch.arange(rows + 1).int().cuda()
    for pool in pools:  # the prompts
        for row, length in enumerate(first.tolist()):
            for position in range(length):
                pool[table[row, position // block_size], :, position % block_size] = 0.5
    tokens = torch.zeros(3, rows, heads, dim, dtype=BF16, device="cuda")  # q, k, v

    def step() -> Tensor:
        lengths.add_(1)
        q, k, v = tokens
        slots = ops.slot_mapping(table, lengths, starts, rows, block_size, backend=backend)
        ops.write_kv(k, v, *pools, slots, backend=backend)
        plan = ops.plan(
            lengths, starts, 1, heads, heads, dim, deterministic=deterministic, backend=backend
        )
        out, _ = ops.paged_attention(
            q, *pools, table, lengths, starts, 1, plan=plan, deterministic=deterministic,
            backend=backend,
        )  # fmt: skip
        return out

    step()  # compiles and warms up what needs it
    lengths.copy_(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths.copy_(first)
    for _ in range(20):
        tokens.copy_(torch.randn(tokens.shape, device="cuda", generator=generator))
        graph.replay()
        expected, _ = ops.paged_attention(
            tokens[0], *pools, table, lengths, starts, 1, backend="reference"
        )
        torch.testing.assert_close(captured, expected, atol=2e-2, rtol=2e-2)


def test_another_stream_is_used(backend: str) -> None:
    args, kwargs = on_gpu(Case("stream", rows=((1, 300),), dtype=BF16))
    expected = ops.paged_attention(*args, **kwargs, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.paged_attention(*args, **kwargs, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


def test_auto_takes_the_compiled_kernels() -> None:
    if ops.backends()["cuda"] != "ready":
        pytest.skip(ops.backends()["cuda"])
    assert ops.table("auto", "cuda").backend == "cuda"
