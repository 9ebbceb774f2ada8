"""Every backend runs the case table against an independent dense computation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_backends import skip_if_values_are_not_read
from op_cases import CASES, Case, build
from op_oracle import assert_as_good_as_dense, dense_attention
from torch import Tensor

from pykvcache import ops

READY = [name for name, status in ops.backends().items() if status == "ready"]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """torch.empty is filled with NaN, so an output element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, backend: str) -> None:
    data = build(case)
    out, lse = ops.paged_attention(*data.args, **data.kwargs, backend=backend)
    assert_as_good_as_dense(case, data, out, lse)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_rows_do_not_depend_on_the_batch(case: Case, backend: str) -> None:
    data = build(case)
    q, k_cache, v_cache, table, lengths, starts, _ = data.args
    out, lse = ops.paged_attention(*data.args, **data.kwargs, deterministic=True, backend=backend)
    assert_as_good_as_dense(case, data, out, lse)
    for row in range(len(case.rows)):
        begin, end = int(starts[row]), int(starts[row + 1])
        kwargs = dict(data.kwargs)
        if case.bias and kwargs["bias"].shape[0] > 1:
            kwargs["bias"] = kwargs["bias"][row : row + 1]
        alone, alone_lse = ops.paged_attention(
            q[begin:end],
            k_cache,
            v_cache,
            table[row : row + 1],
            lengths[row : row + 1],
            torch.tensor([0, end - begin], dtype=torch.int32),
            end - begin + 3,
            **kwargs,
            deterministic=True,
            backend=backend,
        )
        assert torch.equal(alone, out[begin:end])
        assert torch.equal(alone_lse, lse[begin:end])


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_splits_agree(backend: str, threads: int) -> None:
    case = Case("splits", rows=((1, 5000), (40, 900), (1, 3)), num_heads=8, head_dim=64)
    data = build(case)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = ops.paged_attention(*data.args, **data.kwargs, backend=backend)
    finally:
        torch.set_num_threads(before)
    truth, true_lse = dense_attention(case, data, torch.float64)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", READY)
def test_partials_over_disjoint_keys_merge_to_the_whole(backend: str) -> None:
    """Holes split one sequence in two; merging the partials gives attention over all of it."""
    case = Case("merge", rows=((1, 64), (4, 50)), sinks=True)
    data = build(case)
    table = data.args[3]
    whole = ops.paged_attention(*data.args, **data.kwargs, backend=backend)
    parts = []
    for keep in (0, 1):
        holed = table.clone()
        holed[:, keep::2] = -1
        args = (*data.args[:3], holed, *data.args[4:])
        kwargs = {**data.kwargs, "sinks": data.kwargs["sinks"] if keep else None}
        parts.append(ops.paged_attention(*args, **kwargs, backend=backend))
    outs, lses = (torch.stack(side) for side in zip(*parts, strict=True))
    out, lse = ops.merge_states(outs, lses, backend=backend)
    torch.testing.assert_close(out, whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", READY)
def test_block_ids_above_65535(backend: str) -> None:
    case = Case("many-blocks", rows=((1, 9), (3, 6)), block_size=2, head_dim=8)
    data = build(case)
    q, k_cache, v_cache, table, *rest = data.args
    far = 70_000
    big = [torch.full((far + len(c), *c.shape[1:]), torch.nan) for c in (k_cache, v_cache)]
    for target, cache in zip(big, (k_cache, v_cache), strict=True):
        target[far:] = cache
    used = table < len(k_cache)
    moved = torch.where(used, table + far, table)
    expected = ops.paged_attention(*data.args, **data.kwargs, backend="reference")
    out, lse = ops.paged_attention(q, *big, moved, *rest, **data.kwargs, backend=backend)
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
    skip_if_values_are_not_read(backend)
    with pytest.raises(ValueError, match="block"):
        ops.paged_attention(q, k_cache, v_cache, moved, *rest, **data.kwargs, backend=backend)


def sparse(*shape: int, strides: tuple[int, ...] | None = None) -> Tensor:
    """bfloat16; only the touched pages of it become real memory."""
    strides = strides or torch.empty(shape, device="meta").stride()
    elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    storage = torch.UntypedStorage(2 * elements)
    return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, shape, strides)


@pytest.mark.parametrize("backend", READY)
def test_pool_above_2_to_31_elements(backend: str) -> None:
    heads, dim, block_size = 8, 128, 16
    num_blocks = 2**31 // (heads * dim * block_size) + 8
    k_cache, v_cache = (sparse(num_blocks, heads, block_size, dim) for _ in range(2))
    length, last = 25, num_blocks - 1
    slots = torch.cat([torch.arange(16) + last * block_size, torch.arange(9) + 5 * block_size])
    k, v = (torch.randn(length, heads, dim, dtype=torch.bfloat16) for _ in range(2))
    table = torch.tensor([[last, 5]], dtype=torch.int32)
    lengths, starts = torch.tensor([length], dtype=torch.int32), torch.tensor([0, 1]).int()
    ops.write_kv(k, v, k_cache, v_cache, slots, backend=backend)
    q = torch.randn(1, heads, dim, dtype=torch.bfloat16)
    out, _ = ops.paged_attention(q, k_cache, v_cache, table, lengths, starts, 1, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float().transpose(0, 1), k.float().transpose(0, 1), v.float().transpose(0, 1)
    )
    torch.testing.assert_close(out.float(), expected.transpose(0, 1), atol=2e-2, rtol=2e-2)
    pairs = torch.tensor([[last, 9], [5, last - 3]])
    ops.copy_blocks([k_cache, v_cache], [k_cache, v_cache], pairs, backend=backend)
    table = torch.tensor([[9, last - 3]], dtype=torch.int32)
    starts = torch.tensor([0, length]).int()
    gathered = ops.gather_kv(k_cache, v_cache, table, lengths, starts, length, backend=backend)
    assert torch.equal(gathered[0], k) and torch.equal(gathered[1], v)
    table = torch.tensor([[last, last - 3]], dtype=torch.int32)
    gathered = ops.gather_kv(k_cache, v_cache, table, lengths, starts, length, backend=backend)
    assert torch.equal(gathered[0], k) and torch.equal(gathered[1], v)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (20, 64), (1, 60)])
def test_queries_above_2_to_31_elements(backend: str, tokens: int, dim: int) -> None:
    """Of two sequences, for decode, prefill and, with rows that are not aligned, plain kernels."""
    case = Case("far", ((tokens, 30), (tokens, 9)), 2, 1, dim, dtype=torch.bfloat16)
    data = build(case)
    (q, *rest) = data.args
    far = sparse(*q.shape, strides=(2**32 // (tokens * dim) * dim, dim, 1))
    far.copy_(q)
    out, lse = ops.paged_attention(far, *rest, **data.kwargs, backend=backend)
    assert_as_good_as_dense(case, data, out, lse)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("length", [9, 70, 300])  # whole, and cut into pieces of unequal length
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9], ids=str)
def test_a_row_whose_keys_are_all_masked_by_a_finite_bias_spreads_evenly(
    backend: str, tokens: int, length: int, lowest: float
) -> None:
    """As torch SDPA does. Beside such a bias scores vanish, and a log-sum-exp has no room for the
    number of keys."""
    case = Case("masked", ((tokens, length),), causal=False, dtype=torch.bfloat16, bias="float")
    data = build(case)
    kwargs = {**data.kwargs, "bias": torch.full((1, 1, tokens, length), lowest)}
    for deterministic in (False, True):
        out, lse = ops.paged_attention(
            *data.args, **kwargs, deterministic=deterministic, backend=backend
        )
        even = data.values[0].mean(0).repeat_interleave(2, 0).expand_as(out)
        torch.testing.assert_close(out.float(), even, atol=1e-2, rtol=1e-2)
        if lowest == -1e9:
            torch.testing.assert_close(lse, torch.full_like(lse, lowest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("where", ["key", "bias"])
def test_nan_that_a_query_sees_is_not_hidden(
    backend: str, tokens: int, softcap: float, where: str
) -> None:
    """A broken activation or mask must show, and only in the rows that see it."""
    case = Case("nan", ((tokens, 150), (tokens, 90)), dtype=torch.bfloat16, softcap=softcap)
    data = build(case)
    q, k_cache, *rest = data.args
    kwargs = data.kwargs
    if where == "key":
        k_cache = k_cache.clone()
        k_cache[rest[1][0, 70 // 16], 0, 70 % 16] = torch.nan
    else:
        bias = torch.zeros(2, 4, tokens, 150)
        bias[0, :2, :, 70] = torch.nan
        kwargs = {**kwargs, "bias": bias}
    out, lse = ops.paged_attention(q, k_cache, *rest, **kwargs, backend=backend)
    broken = torch.zeros_like(lse, dtype=torch.bool)
    broken[:tokens, :2] = True  # the sequence and the KV head
    assert torch.equal(lse.isnan(), broken) and torch.equal(out.isnan().all(-1), broken)
    assert torch.equal(out.isnan().any(-1), broken)


@pytest.mark.parametrize("backend", READY)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_large_softcap_caps_nothing(backend: str, tokens: int) -> None:
    data = build(Case("cap", ((tokens, 300),), sinks=True))
    expected = ops.paged_attention(*data.args, **data.kwargs, backend=backend)
    kwargs = {**data.kwargs, "softcap": 1e5}
    got = ops.paged_attention(*data.args, **kwargs, backend=backend)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
