"""Triton kernels piece by piece: plan and merge, float8, launch choices. The case table runs
elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from op_cases import BF16, Case, build
from op_oracle import assert_as_good_as_dense

from pykvcache import ops

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if ops.backends()["triton"] != "ready":
    pytest.skip(ops.backends()["triton"], allow_module_level=True)

import triton
import triton.language as tl
from pykvcache.kernels.attention.merge import piece_range
from pykvcache.kernels.common.numeric import decode_e4m3, encode_e4m3, in_unit, unit_of_rows
from pykvcache.kernels.launch import attention, operators, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter", "unknown")


@triton.jit
def decode_all(bits, values, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(values + i, decode_e4m3(tl.load(bits + i)))


@triton.jit
def encode_all(values, bits, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(bits + i, encode_e4m3(tl.load(values + i)))


@triton.jit
def ranges_of_all(plan, rows, programs, ranges):
    row = tl.program_id(0)
    begin, end = piece_range(plan, row, rows, programs, False)
    tl.store(ranges + 2 * row, begin)
    tl.store(ranges + 2 * row + 1, end)


@triton.jit
def units_of_all(x, halves, units):
    i = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    numbers = tl.load(x + i)
    unit = unit_of_rows(numbers)
    tl.store(halves + i, in_unit(numbers, unit))
    tl.store(units + tl.arange(0, 16), unit)


def test_every_float8_is_decoded_exactly() -> None:
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    values = torch.empty(256, device=DEVICE)
    decode_all[(1,)](bits, values, 256)
    expected = bits.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_float8_is_rounded_like_torch() -> None:
    """All values and the midpoints between them, far beyond the range, and random ones."""
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (exact[1:] + exact[:-1]) / 2
    near = torch.cat([middle, middle * (1 + 1e-6), middle * (1 - 1e-6)])
    x = torch.cat([exact, near, torch.randn(1000), torch.tensor([1e9, 447.9, 464.0, 1e-12])])
    x = torch.cat([x, -x, torch.zeros(8192)])[:4096].to(DEVICE)
    bits = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    encode_all[(1,)](x, bits, 4096)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(bits.view(torch.float8_e4m3fn).float(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("magnitude", [-133, -100, -20, 0, 15, 100, 127])
def test_rows_of_bfloat16_fit_float16_in_a_unit_of_their_own(magnitude: int) -> None:
    x = torch.randn(16, 64, dtype=torch.float64) * torch.logspace(0, -30, 64, 2.0)
    x = (x / x.abs().amax(1, keepdim=True) * 2.0**magnitude).bfloat16().to(DEVICE)
    x[3], x[4, 1:], x[5, 7] = 0, 0, torch.nan
    halves = torch.empty(16, 64, dtype=torch.float16, device=DEVICE)
    units = torch.empty(16, device=DEVICE)
    units_of_all[(1,)](x, halves, units)
    back = halves.double() * units.double()[:, None]
    lost = (back - x.double()).abs()[torch.isfinite(x)].max()
    assert lost <= 2.0 ** (magnitude - 39) + 2.0**-126  # below are subnormal numbers
    assert torch.isfinite(halves).sum() == 16 * 64 - 1
    assert (units.log2() == units.log2().round()).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_plan_counts_the_tiles_of_decode_rows(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "processors", lambda _: 0)
    tile = table.decode_tile(table.architecture(torch.device(DEVICE)), 64)
    unit = attention.FIXED_TOKENS if deterministic else tile
    q_lens, lengths = [1, 4, 5, 0, 1, 1], [10 * unit, unit + 1, 3 * unit, 99, 0, 1]
    starts = torch.tensor([0, *q_lens]).cumsum(0).int()
    plan = ops.plan(
        torch.tensor(lengths).int(), starts, 5, 8, 2, 64, deterministic=deterministic,
        backend="triton",
    )  # fmt: skip
    units = [10, 2, 0, 0, 1, 1]  # 5 queries of 4 heads are prefill's; 0 queries have no result
    assert plan.diff().tolist() == units and plan[0] == 0


WIDE = [  # up to 18 row tiles of KV heads
    Case("tail", ((30, 300),), 8, 2, 64),  # 120 rows, 8 tiles
    Case("odd-group", ((7, 200),), 10, 2, 64, window=90, sinks=True),  # tiles end within tokens
    Case("many-heads", ((3, 200),), 20, 1, 80, causal=False),
    Case("speculative", ((5, 200), (17, 233), (1, 64)), 4, 2, 48, softcap=20.0),
    Case("padded", ((12, 5), (12, 100)), 8, 2, 64, chunk=50, holes=((1, 3),)),
    Case("float8", ((9, 150),), 8, 2, 64, cache_dtype=torch.float8_e4m3fn, scales="slot"),
]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_a_few_long_tails_are_cut_along_their_keys(
    case: Case, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "processors", lambda _: 24)
    monkeypatch.setattr(attention, "decode_programs", lambda *_: 5)
    monkeypatch.delattr(attention, "prefill_kernel")
    case = replace(case, dtype=BF16)
    data = build(case)
    plan = None
    if planned:
        plan = ops.plan(
            *data.args[4:7], case.num_heads, case.num_kv_heads, case.head_dim, window=case.window,
            chunk=case.chunk, backend="triton",
        )  # fmt: skip
        assert plan.diff().min() > 0
    out, lse = ops.paged_attention(*data.args, **data.kwargs, plan=plan, backend="triton")
    assert_as_good_as_dense(case, data, out, lse)


def test_which_tails_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "processors", lambda _: 24)
    device = torch.device(DEVICE)
    for group, columns, queries, deterministic, rows in (
        (4, 2, 30, False, 128),
        (4, 2, 32, False, 128),
        (4, 2, 33, False, 16),  # more than prefill takes at once
        (4, 6, 12, False, 48),
        (4, 6, 13, False, 16),  # 24 tiles for 18 processors
        (4, 2, 30, True, 16),
        (64, 2, 1, False, 64),
        (64, 2, 2, False, 128),
    ):
        assert attention.decode_rows(group, columns, queries, deterministic, device) == rows


def test_plan_leaves_out_what_a_window_hides() -> None:
    tile = table.decode_tile(table.architecture(torch.device(DEVICE)), 64)
    starts = torch.tensor([0, 1]).int()
    lengths = torch.tensor([20 * tile]).int()
    plan = ops.plan(lengths, starts, 1, 2, 2, 64, window=2 * tile, backend="triton")
    assert plan.tolist() == [0, 2]


def test_plan_leaves_out_what_lies_in_other_chunks() -> None:
    tile = table.decode_tile(table.architecture(torch.device(DEVICE)), 64)
    starts, lengths = torch.tensor([0, 1, 2]).int(), torch.tensor([20 * tile, 16 * tile]).int()
    plan = ops.plan(lengths, starts, 1, 2, 2, 64, chunk=8 * tile, backend="triton")
    assert plan.tolist() == [0, 4, 12]


def test_plan_refuses_what_attention_refuses() -> None:
    starts, lengths = torch.tensor([0, 1, 2]).int(), torch.tensor([9, 9, 9, 9]).int()
    for change, message in (
        ({"seq_lens": lengths[::2]}, "seq_lens must be contiguous"),
        ({"seq_lens": lengths[:2].long()}, "seq_lens must be int32"),
        ({"num_kv_heads": 0}, "multiple of num_kv_heads"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"window": -1}, "window and chunk must not be negative"),
    ):
        arguments = {
            "seq_lens": lengths[:2], "cu_seqlens_q": starts, "max_seqlen_q": 1, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 64, **change,
        }  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            ops.plan(**arguments, backend="triton")


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 100])
def test_every_piece_of_a_row_is_merged(programs: int) -> None:
    """Slots of a row: program + row of every program whose share of the units meets it."""
    for count in (1, 2, 5, 40):
        units = torch.randint(0, 9, (count,)) * (torch.rand(count) < 0.8)
        plan = torch.cat([torch.zeros(1), units.cumsum(0)]).int()
        total = int(plan[-1])
        sharing = max(min(programs, total), 1)
        cuts = [program * total // sharing for program in range(sharing + 1)]
        ranges = torch.empty(count, 2, dtype=torch.int32, device=DEVICE)
        ranges_of_all[(count,)](plan.to(DEVICE), count, programs, ranges)
        for row, (begin, end) in enumerate(ranges.tolist()):
            first, last = int(plan[row]), int(plan[row + 1])
            meets = [p for p in range(sharing) if max(cuts[p], first) < min(cuts[p + 1], last)]
            assert list(range(begin, end)) == [program + row for program in meets]


@pytest.mark.parametrize("rows", [130, 300])
def test_more_rows_than_a_program_looks_at_at_once(rows: int) -> None:
    lengths = [(1, 1 + 37 * row % 70) for row in range(rows)]
    lengths[rows - 2] = (3, 90)
    data = build(Case("many", tuple(lengths), 2, 1, 16, block_size=8))
    expected = ops.paged_attention(*data.args, **data.kwargs, backend="reference")
    got = ops.paged_attention(*data.args, **data.kwargs, backend="triton")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("programs", [1, 2, 5, 64])
def test_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in one piece, in several, and pieces of several rows in one program."""
    monkeypatch.setattr(attention, "decode_programs", lambda *_: programs)
    rows = ((1, 2700), (1, 0), (2, 130), (1, 5), (0, 9), (1, 64))  # 2,700 tokens: up to 43 pieces
    case = Case("pieces", rows=rows, sinks=True)
    data = build(case)
    expected = ops.paged_attention(*data.args, **data.kwargs, backend="reference")
    got = ops.paged_attention(*data.args, **data.kwargs, backend="triton")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_bits_of_a_row_do_not_depend_on_its_batch() -> None:
    case = Case("alone", rows=((1, 2100), (3, 40), (9, 60), (1, 1030)))
    data = build(case)
    q, k_cache, v_cache, blocks, lengths, starts, longest = data.args
    options = {**data.kwargs, "deterministic": True, "backend": "triton"}
    out, lse = ops.paged_attention(*data.args, **options)
    for row in range(len(lengths)):
        begin, end = int(starts[row]), int(starts[row + 1])
        alone = (
            q[begin:end], k_cache, v_cache, blocks[row : row + 1], lengths[row : row + 1],
            torch.tensor([0, end - begin]).int(), end - begin + longest * (row % 2),
        )  # fmt: skip
        own, own_lse = ops.paged_attention(*alone, **options)
        assert torch.equal(own, out[begin:end]) and torch.equal(own_lse, lse[begin:end])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launch_table_serves_every_size(arch: str) -> None:
    for dim in range(1, 577):
        tiles = {table.choose("decode", arch, dim, size).tile for size in (1, 2, 4)}
        assert tiles == {table.decode_tile(arch, dim)}  # the plan does not know the dtype
        assert attention.FIXED_TOKENS % tiles.pop() == 0
        for size in (1, 2, 4):
            assert table.choose("prefill", arch, dim, size).rows >= 16


def test_split_dims_cover_and_pad_little() -> None:
    for dim in range(1, 577):
        first, second = attention.split_dim(dim)
        assert first + second >= dim and first >= 16
        assert first + second <= max(16, dim + max(15, dim // 3))
    assert attention.split_dim(576) == (512, 64)
    assert attention.split_dim(80) == (64, 16)


@pytest.mark.parametrize(("heads", "dim"), [(128, 64), (32, 320), (71, 64)])
def test_many_heads_are_taken_in_groups(heads: int, dim: int) -> None:
    """One KV head, so many query heads that they are more than one tile, or an odd number."""
    case = Case("heads", ((1, 70), (2, 19)), heads, 1, dim, alibi=True, sinks=True)
    data = build(case)
    expected = ops.paged_attention(*data.args, **data.kwargs, backend="reference")
    plan = ops.plan(*data.args[4:], heads, 1, dim, backend="triton")
    got = ops.paged_attention(*data.args, **data.kwargs, plan=plan, backend="triton")
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_heads_further_apart_than_int32_counts() -> None:
    """q as a model leaves it, [HQ, T, D] transposed, with 2^31 elements before its last head."""
    heads, dim, stride = 4, 16, 2**30
    q = torch.empty(0, dtype=torch.bfloat16).set_(
        torch.UntypedStorage(2 * (heads * stride)), 0, (2, heads, dim), (dim, stride, 1)
    )
    q.copy_(torch.randn(2, heads, dim))
    case = Case("far", ((2, 20),), heads, 2, dim, dtype=torch.bfloat16)
    data = build(case)
    args = (q, *data.args[1:])
    expected = ops.paged_attention(q.contiguous(), *args[1:], **data.kwargs, backend="triton")
    got = ops.paged_attention(*args, **data.kwargs, backend="triton")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_channel_scales_of_tokens_in_any_order() -> None:
    """More tokens than are looked at together, blocks' tokens far apart in the call."""
    tokens, heads, dim, block_size = 300, 2, 128, 4
    k = torch.randn(tokens, heads, dim)
    slots = torch.randperm(400)[:tokens]
    cache = torch.zeros(100, heads, block_size, dim).to(torch.float8_e4m3fn)
    found = []
    for backend in ("reference", "triton"):
        pool, scale = cache.clone(), torch.full((100, heads, dim), 0.5)
        ops.write_kv(k, k, pool, pool.clone(), slots, k_scale=scale, v_scale=scale.clone(),
                     backend=backend)  # fmt: skip
        found.append((scale, pool.float()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[1][0] != 0.5).any()


def test_every_unknown_chip_has_a_choice_of_its_vendor() -> None:
    assert table.choose("decode", "gfx1100", 128, 2) == table.choose("decode", "gfx942", 128, 2)
    assert table.choose("prefill", "sm_86", 128, 2) == table.choose("prefill", "unknown", 128, 2)
    assert table.choose("decode", "gfx942", 128, 2) != table.choose("decode", "sm_80", 128, 2)


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
@pytest.mark.parametrize("as_list", [False, True])
def test_kernels_run_on_the_device_of_their_tensors(
    current: int, entered: list[int], as_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the current device is, to which Triton would launch."""
    seen: list[int] = []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        seen.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    tensor = mock.Mock(spec=torch.Tensor, is_cuda=True, device=torch.device("cuda:1"))
    first = [tensor] if as_list else tensor
    assert operators.on_device_of_tensors(lambda *given: given)(first, 5) == (first, 5)
    assert seen == entered
