"""Where the CPU prefill kernel changes its path: tiles, panels, storage, strides, splits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import BF16, F16, F32, Case, Data, build
from op_oracle import assert_as_good_as_dense
from test_cpu_decode import INSTRUCTION_SETS, attend, run_with, threads

from pykvcache import ops

pytestmark = pytest.mark.skipif(ops.backends()["cpu"] != "ready", reason="_C is not built")

FP8 = torch.float8_e4m3fn
# A tile is 128 or 256 keys, a panel 8, 16 or 64 rows, an item 256 or 512 rows.
LONG = ((257, 257), (70, 513), (1, 300), (129, 400))

TILES = [
    Case("tiles", LONG, num_heads=8, num_kv_heads=2),
    Case("tiles-mha", LONG, num_heads=2, num_kv_heads=2, head_dim=128, block_size=32),
    Case("tiles-odd", LONG, num_heads=3, num_kv_heads=1, head_dim=41, v_head_dim=23, block_size=5),
    Case("tiles-wide", ((140, 300),), num_heads=4, num_kv_heads=1, head_dim=320, v_head_dim=512),
    Case("tiles-not-causal", LONG, causal=False),
    Case("tiles-window", LONG, window=150, sinks=True),
    Case("tiles-window-not-causal", LONG, window=150, causal=False),
    Case("tiles-chunk", LONG, chunk=130),
    Case("tiles-softcap", LONG, softcap=4.0, spread=2.0),
    Case("tiles-alibi", LONG, alibi=True, sinks=True),
    Case("tiles-bias", LONG, bias="float", causal=False),
    Case("tiles-mask", LONG, bias="bool"),
    Case("tiles-sharp", LONG, spread=5.0),
    # Whole tiles are holes, holes begin and end inside of tiles, and one row has nothing else.
    Case("tiles-holes", LONG, holes=(*((1, i) for i in range(2, 27)), (0, 3), (3, 24))),
    Case("tiles-all-holes", LONG, holes=tuple((3, i) for i in range(25)), sinks=True),
    Case("tiles-padded", ((300, 260), (80, 7), (20, 0))),
]

# Rows that fill panels of every width to every number of vectors.
PANELS = [
    Case(f"panel-{rows}", ((rows, rows + 9),), num_heads=heads, num_kv_heads=1, head_dim=24)
    for rows, heads in ((3, 7), (5, 5), (12, 4), (17, 1), (33, 1), (49, 1), (65, 1), (11, 64))
]

STORAGE = [
    *(Case(f"fp8-{kind}", LONG, scales=kind, cache_dtype=FP8)
      for kind in ("scalar", "head", "slot", "channel")),
    Case("fp8-odd", LONG, head_dim=37, scales="channel", cache_dtype=FP8),
    Case("fp8-latent", ((40, 300),), num_heads=8, num_kv_heads=1, head_dim=96, v_head_dim=80,
         latent=True, scales="slot", cache_dtype=FP8),
    *(Case(f"cache-{str(cache)[6:]}", LONG, cache_dtype=cache) for cache in (F32, F16, BF16)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("case", [*TILES, *PANELS, *STORAGE], ids=lambda case: case.name)
def test_case(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    data = build(case)
    assert_as_good_as_dense(case, data, *attend(data))


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_cases_on_every_instruction_set(isa: str) -> None:
    chosen = run_with(isa, "-c", "import torch, pykvcache._C as C; print(C.cpu_isa())")
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this CPU runs {chosen.stdout.strip()} instead: {chosen.stderr[-200:]}")
    run = run_with(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_case["
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_rows_of_the_pool_may_be_unaligned_and_apart(dtype: torch.dtype) -> None:
    """Keys are read where they lie: slots an odd number of elements apart, NaN between them."""
    case = Case("apart", LONG, dtype=dtype)
    data = build(case)
    args = list(data.args)
    for side in (1, 2):
        pool = args[side]
        wide = torch.full((*pool.shape[:3], pool.shape[3] + 4), torch.nan, dtype=dtype)
        args[side] = wide[..., 1:-3]
        args[side].copy_(pool)
    moved = Data(tuple(args), data.kwargs, data.keys, data.values, data.present)
    got, expected = attend(moved), attend(data)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [0, 90])
def test_chunked_prefill_agrees_with_whole_prefill(dtype: torch.dtype, window: int) -> None:
    case = Case("chunked", ((640, 640),), num_heads=4, num_kv_heads=2, window=window, dtype=dtype)
    data = build(case)
    q, k_cache, v_cache, table, *_ = data.args
    whole, whole_lse = attend(data)
    for begin, end in ((0, 100), (100, 401), (401, 640)):
        lengths = torch.tensor([end], dtype=torch.int32)
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        args = (q[begin:end], k_cache, v_cache, table, lengths, starts, end - begin)
        out, lse = attend(Data(args, data.kwargs))
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, whole[begin:end], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, whole_lse[begin:end], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_long_items_are_split_along_the_keys(count: int) -> None:
    """A chunk of a long prompt with two KV heads: fewer query tiles than threads."""
    case = Case("chunk", ((32, 6000),), num_heads=8, num_kv_heads=2, sinks=True)
    data = build(case)
    with threads(count):
        for deterministic in (False, True):
            assert_as_good_as_dense(case, data, *attend(data, deterministic=deterministic))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_bias_of_the_lowest_float_on_every_key_spreads_evenly(dtype: torch.dtype) -> None:
    """Masks made of finfo.min must not turn a fully masked row into zeros or NaN."""
    case = Case("lowest", ((20, 150),), causal=False, dtype=dtype)
    data = build(case)
    bias = torch.full((1, 1, 20, 150), torch.finfo(torch.float32).min)
    out, _ = attend(data, bias=bias)
    expected = data.values[0].mean(0).repeat_interleave(2, 0).expand(20, -1, -1)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_negative_scale_is_not_taken_for_a_positive_one() -> None:
    data = build(Case("negative", ((40, 300),)))
    q, *rest = data.args
    expected = attend(Data((-q, *rest), data.kwargs))
    out, lse = attend(data, scale=-data.kwargs["scale"])
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)
