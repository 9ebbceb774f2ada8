"""write_kv, gather_kv, copy_blocks, slot_mapping and merge_states on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_backends import skip_if_values_are_not_read

from pykvcache import ops

READY = [name for name, status in ops.backends().items() if status == "ready"]
pytestmark = pytest.mark.parametrize("backend", READY)
FP8 = torch.float8_e4m3fn


def _pool(blocks: int, heads: int, size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((blocks, heads, size, dim), torch.nan).to(dtype)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_write_then_gather_is_identity(
    backend: str, layout: str, dtype: torch.dtype, block_size: int
) -> None:
    heads, dim, v_dim, lengths = 3, 40, 24, [37, 0, 16, 1]
    per_row = [-(-n // block_size) for n in lengths]
    ids = torch.randperm(sum(per_row) + 2)
    table = torch.full((4, max(per_row)), -1, dtype=torch.int32)
    for row, count in enumerate(per_row):
        table[row, :count] = ids[sum(per_row[:row]) :][:count].int()
    pools = [_pool(len(ids), heads, block_size, d, dtype) for d in (dim, v_dim)]
    if layout == "NHD":
        pools = [p.transpose(1, 2).contiguous() for p in pools]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    seq_lens, total = torch.tensor(lengths).int(), sum(lengths)
    qkv = torch.randn(total, heads, dim + v_dim).to(dtype)
    k, v = qkv[..., :dim], qkv[..., dim:]
    slots = ops.slot_mapping(table, seq_lens, starts, total, block_size, backend=backend)
    ops.write_kv(k, v, *pools, slots, layout=layout, backend=backend)
    k_back, v_back = ops.gather_kv(
        *pools, table, seq_lens, starts, total, layout=layout, backend=backend
    )
    assert torch.equal(k_back, k) and torch.equal(v_back, v)
    untouched = len(ids) * block_size - total
    assert sum(p.isnan().sum() // p.shape[-1] // heads for p in pools) == 2 * untouched


def test_write_skips_minus_one(backend: str) -> None:
    cache = _pool(2, 1, 4, 8, torch.float32)
    k = torch.randn(3, 1, 8)
    ops.write_kv(k, k, cache, cache, torch.tensor([5, -1, 0]), backend=backend)
    assert torch.equal(cache[1, 0, 1], k[0, 0]) and torch.equal(cache[0, 0, 0], k[2, 0])
    assert cache.isnan().sum() == 6 * 8


def test_write_without_values(backend: str) -> None:
    cache = _pool(2, 1, 4, 576, torch.bfloat16)
    k = torch.randn(1, 1, 576).bfloat16()
    ops.write_kv(k, None, cache, None, torch.tensor([6]), backend=backend)
    assert torch.equal(cache[1, 0, 2], k[0, 0])
    dense, empty = ops.gather_kv(
        cache, None, torch.tensor([[1]]).int(), torch.tensor([3]).int(),
        torch.tensor([0, 3]).int(), 3, backend=backend,
    )  # fmt: skip
    assert torch.equal(dense[2], k[0]) and empty.shape == (3, 1, 0)


@pytest.mark.parametrize("kind", ["scalar", "head", "slot", "channel"])
def test_quantised_write_keeps_values_within_a_rounding(backend: str, kind: str) -> None:
    heads, dim, block_size, count = 2, 16, 4, 11
    shape = {
        "scalar": (),
        "head": (heads,),
        "slot": (4, heads, block_size),
        "channel": (4, heads, dim),
    }
    k = torch.randn(count, heads, dim)
    cache, values = _pool(4, heads, block_size, dim, FP8), _pool(4, heads, block_size, dim, FP8)
    filled = kind in ("slot", "channel")
    scale = torch.full(shape[kind], torch.nan if filled else k.abs().max().item() / 448)
    v_scale = scale.clone()
    slots = torch.arange(count)
    ops.write_kv(k, k, cache, values, slots, k_scale=scale, v_scale=v_scale, backend=backend)
    factor = {
        "scalar": lambda: scale.expand(count, heads, dim),
        "head": lambda: scale[None, :, None].expand(count, heads, dim),
        "slot": lambda: scale.transpose(1, 2).reshape(-1, heads, 1)[:count].expand(-1, -1, dim),
        "channel": lambda: scale[slots // block_size],
    }[kind]()
    stored = cache.float().transpose(1, 2).reshape(-1, heads, dim)[:count]
    # e4m3 has 3 mantissa bits: half a step is 1/16 of the value, or of the smallest normal
    assert ((stored * factor - k).abs() <= k.abs() / 16 + factor * 2**-10 * 1.01).all()
    assert torch.equal(scale.nan_to_num(), v_scale.nan_to_num())
    if kind == "slot":
        torch.testing.assert_close(factor[..., 0], k.abs().amax(-1) / 448)


def test_quantised_write_saturates(backend: str) -> None:
    cache = _pool(1, 1, 1, 4, FP8)
    k = torch.tensor([[[1e6, -1e6, 449.0, 0.0]]])
    ops.write_kv(k, k, cache, cache.clone(), torch.tensor([0]), backend=backend)
    assert cache.float().flatten().tolist() == [448.0, -448.0, 448.0, 0.0]


def test_slot_mapping_of_padding_holes_and_spare_tokens(backend: str) -> None:
    table = torch.tensor([[3, -1, 0], [1, 2, -1]]).int()
    slots = ops.slot_mapping(
        table, torch.tensor([9, 7]).int(), torch.tensor([0, 12, 14]).int(), 16, 4, backend=backend
    )
    expected = [-1, -1, -1, 12, 13, 14, 15, -1, -1, -1, -1, 0, 9, 10, -1, -1]
    assert slots.dtype == torch.int64 and slots.tolist() == expected


def test_gather_gives_zeros_in_holes(backend: str) -> None:
    cache = _pool(3, 1, 2, 4, torch.float32)
    cache[1] = 1.0
    dense, _ = ops.gather_kv(
        cache, cache, torch.tensor([[-1, 1]]).int(), torch.tensor([3]).int(),
        torch.tensor([0, 3]).int(), 3, backend=backend,
    )  # fmt: skip
    assert dense[:, 0, 0].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_copy_blocks(backend: str, dtype: torch.dtype) -> None:
    storage = torch.randn(6, 2, 2, 4, 8).to(dtype)
    before = storage.clone()
    caches = [storage[:, 0], storage[:, 1].transpose(1, 2)]
    pairs = torch.tensor([[0, 3], [0, 4], [1, 2]])
    ops.copy_blocks(caches, caches, pairs, backend=backend)
    expected = before.view(torch.uint8).clone()
    for source, target in pairs.tolist():
        expected[target] = before.view(torch.uint8)[source]
    assert torch.equal(storage.view(torch.uint8), expected)


def test_copy_between_pools_of_different_size(backend: str) -> None:
    small, large = torch.randn(3, 1, 2, 4), torch.zeros(50, 1, 2, 4)
    ops.copy_blocks([small], [large], torch.tensor([[2, 49]]), backend=backend)
    assert torch.equal(large[49], small[2]) and large[:49].abs().sum() == 0
    ops.copy_blocks([], [], torch.tensor([[2, 49]]), backend=backend)
    ops.copy_blocks([small], [large], torch.empty(0, 2, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_ignores_empty_partials(backend: str, dtype: torch.dtype) -> None:
    outs, lses = torch.randn(3, 5, 2, 8).to(dtype), torch.randn(3, 5, 2) * 20
    lses[0, 1], outs[0, 1] = -torch.inf, torch.nan
    lses[:, 2], outs[:, 2] = -torch.inf, torch.nan
    out, lse = ops.merge_states(outs, lses, backend=backend)
    assert out.dtype == dtype and (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    weights = lses.double().softmax(0).nan_to_num()[..., None]
    expected = (outs.double().nan_to_num() * weights).sum(0)
    # An lse is rounded to float32, and exp turns that absolute error into a relative one.
    exponent_error = torch.finfo(torch.float32).eps * lses.nan_to_num(neginf=0).abs().max().item()
    tolerance = 4 * torch.finfo(dtype).eps + exponent_error
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), lses.double().logsumexp(0))


BAD_WRITES = {
    "k_cache dims": ({"k_cache": torch.zeros(2, 4, 8)}, r"k_cache must be \[num_blocks, HKV"),
    "heads": ({"k": torch.zeros(3, 2, 8)}, "HKV is 1 but got 2"),
    "dim": ({"k": torch.zeros(3, 1, 9)}, "D is 8 but got 9"),
    "tokens": ({"v": torch.zeros(2, 1, 8)}, "T is 3 but got 2"),
    "dtype": ({"k": torch.zeros(3, 1, 8).half()}, "float16"),
    "integer": ({"k": torch.zeros(3, 1, 8).int()}, "k must be float32"),
    "two dtypes": ({"v": torch.zeros(3, 1, 8).half()}, "v must be float32, got float16"),
    "two cache dtypes": (
        {"v_cache": torch.zeros(2, 1, 4, 8).to(torch.float8_e4m3fn)},
        "v_cache must be float32, got float8_e4m3fn",
    ),
    "float8": ({"k": torch.zeros(3, 1, 8).to(torch.float8_e4m3fn)}, "k must be float32"),
    "bool": ({"k_cache": torch.zeros(2, 1, 4, 8).bool()}, "k_cache must be float32.* got bool"),
    "slots dtype": ({"slot_mapping": torch.zeros(3).int()}, "slot_mapping must be int64"),
    "slot": ({"slot_mapping": torch.tensor([0, 1, 8])}, "8"),
    "slot -2": ({"slot_mapping": torch.tensor([0, 1, -2])}, "-2"),
    "expanded": (
        {"v_cache": torch.zeros(1, 1, 4, 8).expand(2, 1, 4, 8)},
        "must not be expanded",
    ),
    "block_size": ({"k_cache": torch.zeros(2, 1, 0, 8)}, "block_size must be at least 1, got 0"),
    "no v": ({"v": None}, "v and v_cache must be given together"),
    "scale": ({"k_scale": torch.zeros(5)}, r"k_scale must have shape \[\]"),
    "scale dtype": ({"k_scale": torch.zeros(()).double()}, "k_scale must be float32"),
}


@pytest.mark.parametrize("name", BAD_WRITES)
def test_bad_write_names_the_argument_and_writes_nothing(backend: str, name: str) -> None:
    if name in ("slot", "slot -2"):
        skip_if_values_are_not_read(backend)
    change, message = BAD_WRITES[name]
    good = {
        "k": torch.ones(3, 1, 8),
        "v": torch.ones(3, 1, 8),
        "k_cache": torch.zeros(2, 1, 4, 8),
        "v_cache": torch.zeros(2, 1, 4, 8),
        "slot_mapping": torch.arange(3),
    }
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ops.write_kv(**{**good, **change}, backend=backend)
    assert "\n" not in str(error.value)
    assert good["k_cache"].sum() == 0 and good["v_cache"].sum() == 0


def test_keys_and_values_of_two_dtypes_do_not_go_to_float8(backend: str) -> None:
    """One dtype reads both: bits of the other would be taken for its numbers."""
    caches = [torch.zeros(2, 1, 4, 8).to(torch.float8_e4m3fn) for _ in range(2)]
    k, v = torch.ones(3, 1, 8).half(), torch.ones(3, 1, 8).bfloat16()
    with pytest.raises((ValueError, TypeError), match="v must be float16, got bfloat16"):
        ops.write_kv(k, v, *caches, torch.arange(3), backend=backend)
    assert all((cache.float() == 0).all() for cache in caches)


@pytest.mark.parametrize(
    ("src", "dst", "pairs", "message"),
    [
        ([(2, 4)], [(2, 4)], [[0, 2]], "has 2"),
        ([(2, 4)], [(2, 4)], [[-1, 1]], "-1"),
        ([(2, 4)], [(2, 5)], [[0, 1]], "blocks of one shape"),
        ([(2, 4)], [], [[0, 1]], "equally long"),
        ([(3, 4)], [(3, 4)], [[0, 1], [2, 1]], "has block 1 as a destination twice"),
    ],
)
def test_bad_copy(
    backend: str,
    src: list[tuple[int, ...]],
    dst: list[tuple[int, ...]],
    pairs: list[list[int]],
    message: str,
) -> None:
    if "has" in message or "-1" in message:
        skip_if_values_are_not_read(backend)
    sources, targets = ([torch.ones(shape) for shape in side] for side in (src, dst))
    with pytest.raises((ValueError, TypeError), match=message):
        ops.copy_blocks(sources, targets, torch.tensor(pairs), backend=backend)


def test_copies_within_a_pool_stay_apart(backend: str) -> None:
    skip_if_values_are_not_read(backend)
    pool, other = torch.arange(12.0).view(3, 4), torch.zeros(3, 4)
    pairs = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="block 1 as a source and as a destination"):
        ops.copy_blocks([pool], [pool], pairs, backend=backend)
    assert torch.equal(pool, torch.arange(12.0).view(3, 4))
    ops.copy_blocks([pool], [other], pairs, backend=backend)  # another pool: other blocks
    assert torch.equal(other[1:], pool[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.tensor([[0, -2]]).int()}, "-2"),
        ({"cu_seqlens_k": torch.tensor([0, 6]).int()}, "cu_seqlens_k must be the running sum"),
        ({"cu_seqlens_k": torch.tensor([1, 6]).int()}, "cu_seqlens_k must be the running sum"),
        ({"total_k": 4}, "end at total_k = 4"),
        (
            {"v_cache": torch.ones(2, 1, 4, 8).to(torch.float8_e4m3fn)},
            "v_cache must be float32, got float8_e4m3fn",
        ),
    ],
)
def test_bad_gather(backend: str, change: dict[str, Any], message: str) -> None:
    if "v_cache" not in change:
        skip_if_values_are_not_read(backend)
    good = {
        "k_cache": torch.ones(2, 1, 4, 8),
        "v_cache": None,
        "block_table": torch.tensor([[0, 1]]).int(),
        "seq_lens": torch.tensor([5]).int(),
        "cu_seqlens_k": torch.tensor([0, 5]).int(),
        "total_k": 5,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        ops.gather_kv(**{**good, **change}, backend=backend)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4).half(), "lses must be float32"),
        (torch.ones(2, 3, 4, 8), torch.ones(2, 3, 5), "lses must be"),
        (torch.ones(2, 3, 8), torch.ones(2, 3), "outs must be"),
        (torch.ones(2, 3, 4, 8).bool(), torch.ones(2, 3, 4), "outs must be float32.* got bool"),
        (
            torch.ones(2, 3, 4, 8).to(torch.float8_e4m3fn),
            torch.ones(2, 3, 4),
            "outs must be float32.* got float8_e4m3fn",
        ),
    ],
)
def test_bad_merge(backend: str, outs: torch.Tensor, lses: torch.Tensor, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ops.merge_states(outs, lses, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": -1}, "block_size must be at least 1, got -1"),
        ({"num_tokens": 2}, "cu_seqlens_q ends at 3 but num_tokens is 2"),
        ({"num_tokens": -1}, "cu_seqlens_q ends at 3 but num_tokens is -1"),
        ({"seq_lens": torch.tensor([9, 1])}, "seq_lens must be int32"),
        (
            {"seq_lens": torch.tensor([9, 1]).int()},
            r"seq_lens\[0\] is 9 but block_table holds 0 to 8",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 100, 3]).int()}, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_q": torch.tensor([1, 2, 3]).int()}, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_q": torch.tensor([0, 3]).int()}, r"cu_seqlens_q must be \[B \+ 1\]"),
    ],
)
def test_bad_slot_mapping(backend: str, change: dict[str, Any], message: str) -> None:
    if "block_size" not in change and "must be" not in message:
        skip_if_values_are_not_read(backend)
    good = {
        "block_table": torch.tensor([[0, 1], [2, -1]]).int(),
        "seq_lens": torch.tensor([5, 1]).int(),
        "cu_seqlens_q": torch.tensor([0, 2, 3]).int(),
        "num_tokens": 3,
        "block_size": 4,
    }
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ops.slot_mapping(**{**good, **change}, backend=backend)
    assert "\n" not in str(error.value)


def test_merge_does_not_hide_nan(backend: str) -> None:
    outs, lses = torch.ones(2, 2, 1, 4), torch.zeros(2, 2, 1)
    lses[0, 0] = torch.nan
    out, lse = ops.merge_states(outs, lses, backend=backend)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert (out[1] == 1).all() and not lse[1].isnan().any()


@pytest.mark.filterwarnings("ignore:pykvcache runs its slow reference")
def test_a_meta_tensor_among_real_ones_is_an_error(backend: str) -> None:
    k, cache, slots = torch.ones(3, 1, 8), torch.zeros(2, 1, 4, 8), torch.arange(3)
    with pytest.raises(ValueError, match=r"^k must be on cpu, got meta$"):
        ops.write_kv(k.to("meta"), k, cache, cache.clone(), slots, backend=backend)
    with pytest.raises(ValueError, match=r"^slot_mapping must be on cpu, got meta$"):
        ops.write_kv(k, k, cache, cache.clone(), slots.to("meta"), backend=backend)
    with pytest.raises(ValueError, match=r"^dst must be on cpu, got meta$"):
        ops.copy_blocks([cache], [cache.to("meta")], torch.tensor([[0, 1]]), backend=backend)
