"""`KVPool`, `AttentionMetadata` and the `PagedAttention` module, without transformers."""

from __future__ import annotations

import pytest
import torch

from pykvcache import AttentionMetadata, BlockAllocator, KVPool, PagedAttention
from pykvcache.plot import FREE, block_owners


def states(heads: int, dim: int, tokens: int = 3) -> torch.Tensor:
    """Keys [1, heads, tokens, dim]."""
    return torch.randn(1, heads, tokens, dim)


def bound_pool(**settings: int) -> KVPool:
    """Two groups of two layers and one layer, sharing storages by position."""
    pool = KVPool([0, 1, 0], block_size=4, **settings)
    k, v = states(2, 8), states(2, 6)
    pool.open(k, v, wanted=10)
    for layer in range(3):
        pool.bind(layer, k, v)
    return pool


def test_layers_share_storage_by_position() -> None:
    pool = bound_pool()
    first, second, third = (pool.caches(layer)[0] for layer in range(3))
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() != third.data_ptr()
    assert first.shape == (10, 2, 4, 8)
    assert pool.caches(0)[1].shape == (10, 2, 4, 6)
    assert pool.block_bytes == 2 * 4 * 2 * (8 + 6) * 4
    assert pool.allocated_bytes == 10 * pool.block_bytes


def test_unlike_layers() -> None:
    """A smaller layer takes part of another group's storage, a larger one gets its own."""
    pool = KVPool([0, 1, 2], block_size=4)
    pool.open(states(2, 8), states(2, 8), wanted=3)
    pool.bind(0, states(2, 8), states(2, 8))
    pool.bind(1, states(1, 8), states(1, 8))
    pool.bind(2, states(2, 16), states(2, 16))
    k_caches = [pool.caches(layer)[0] for layer in range(3)]
    assert k_caches[0].data_ptr() == k_caches[1].data_ptr()
    assert k_caches[2].data_ptr() != k_caches[0].data_ptr()
    assert k_caches[1].shape == (3, 1, 4, 8)
    assert k_caches[1].stride(0) == k_caches[0].stride(0)


def test_growth_keeps_blocks() -> None:
    pool = bound_pool()
    seqs = pool.allocator.allocate([20])
    for layer in (0, 2):
        for side in pool.caches(layer):
            side.normal_()
    before = [[side.clone() for side in pool.caches(layer)] for layer in (0, 2)]
    pool.grow(25 - pool.num_blocks, pool.num_blocks)
    assert pool.num_blocks == 25
    used = pool.allocator.block_table(seqs)[0]
    for layer, sides in zip((0, 2), before, strict=True):
        for now, then in zip(pool.caches(layer), sides, strict=True):
            assert now.shape[0] == 25
            assert torch.equal(now[used], then[used])


def test_copy_stays_in_its_group() -> None:
    pool = bound_pool()
    for layer in (0, 2):
        for side in pool.caches(layer):
            side.normal_()
    third = pool.caches(2)[0].clone()
    pool.copy_blocks(1, torch.tensor([[3, 7]]))
    assert torch.equal(pool.caches(0)[0][7], pool.caches(0)[0][3])
    assert torch.equal(pool.caches(2)[0], third)
    pool.copy_blocks(0, torch.tensor([[3, 7]]))
    assert torch.equal(pool.caches(2)[0][7], third[3])


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dims", [(64, 64), (7, 5)])
def test_scales_are_part_of_a_float8_block(dims: tuple[int, int]) -> None:
    """Whatever moves a block moves its scales; those of two layers of a storage are apart."""
    heads, size = 3, 5
    k, v = (states(heads, dim) for dim in dims)
    pool = KVPool([0, 1, 0], block_size=size, kv_dtype=FLOAT8)
    pool.open(k, v, wanted=4)
    for layer in range(3):
        pool.bind(layer, k, v)
    assert pool.k_caches[0].data_ptr() == pool.k_caches[1].data_ptr()
    scales = [(pool.k_scales[layer], pool.v_scales[layer]) for layer in (0, 2)]
    cells = heads * size
    assert 0 <= pool.block_bytes - 2 * cells * (sum(dims) + 2 * 4) < 2 * 32
    for side, dim in enumerate(dims):
        cache = pool.caches(0)[side]
        assert (cache.dtype, cache.shape) == (FLOAT8, (4, heads, size, dim))
        assert cache.stride(0) % 16 == 0
        assert scales[0][side].shape == (4, heads, size)
    parts = [*pool.caches(0), *scales[0], *pool.caches(2), *scales[1]]
    parts = [part.view(torch.uint8) if part.dtype == FLOAT8 else part for part in parts]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts))
    pool.allocator.allocate([2 * size])
    for part in scales[0]:
        part.normal_()
    before = [part.clone() for part in scales[0]]
    pool.copy_blocks(0, torch.tensor([[1, 0]]))
    pool.grow(9, pool.num_blocks)
    for part, then in zip((pool.k_scales[0], pool.v_scales[0]), before, strict=True):
        assert torch.equal(part[:2], then[[1, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"num_blocks": 2, "memory": 3}, "give num_blocks or memory, not both, got 2 and 3"),
        (
            {"kv_dtype": torch.int8},
            "kv_dtype must be one of float32, float16, bfloat16, float8_e4m3fn",
        ),
    ],
)
def test_pool_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPool([0], **settings)


def test_unbound_layer() -> None:
    with pytest.raises(ValueError, match="layer 0 has no cache before its first update"):
        KVPool([0]).caches(0)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("window", [0, 3])
def test_module_against_sdpa(layout: str, window: int) -> None:
    """Two steps of two sequences of different length."""
    torch.manual_seed(0)
    heads, kv_heads, dim, block_size = 4, 2, 8, 4
    module = PagedAttention(heads, dim, kv_heads, window=window, layout=layout)
    allocator = BlockAllocator(20, block_size)
    inner = (kv_heads, block_size) if layout == "HND" else (block_size, kv_heads)
    k_cache, v_cache = torch.full((2, 20, *inner, dim), torch.nan)
    seqs = allocator.allocate([0, 0])
    past: list[list[torch.Tensor]] = [[], []]
    for counts in ([5, 9], [1, 3]):
        allocator.append(seqs, counts)
        metadata = AttentionMetadata.of(allocator, seqs, counts)
        assert metadata.max_seqlen_q == max(counts)
        total = sum(counts)
        q = torch.randn(total, heads, dim)
        kv = torch.randn(total, 2, kv_heads, dim)
        out = module(q, kv[:, 0], kv[:, 1], k_cache, v_cache, metadata)
        start = 0
        for row, count in enumerate(counts):
            past[row].append(kv[start : start + count])
            k, v = torch.cat(past[row]).unbind(1)
            length = len(k)
            q_pos = torch.arange(length - count, length)[:, None]
            k_pos = torch.arange(length)[None]
            visible = (k_pos <= q_pos) & (k_pos > q_pos - (window or length + 1))
            wanted = torch.nn.functional.scaled_dot_product_attention(
                q[start : start + count].transpose(0, 1),
                k.transpose(0, 1).repeat_interleave(2, 0),
                v.transpose(0, 1).repeat_interleave(2, 0),
                attn_mask=visible,
            ).transpose(0, 1)
            torch.testing.assert_close(out[start : start + count], wanted, atol=1e-5, rtol=0)
            start += count


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_module_with_float8_caches(layout: str) -> None:
    """It fills the scales of slots, and reads what it has written."""
    torch.manual_seed(0)
    heads, dim, tokens = 2, 64, 9
    inner = (heads, 4) if layout == "HND" else (4, heads)
    caches = [torch.zeros(5, *inner, dim).to(FLOAT8) for _ in range(2)]
    scales = [torch.full((5, heads, 4), torch.nan) for _ in range(2)]
    allocator = BlockAllocator(5, 4)
    seqs = allocator.allocate([0])
    allocator.append(seqs, [tokens])
    metadata = AttentionMetadata.of(allocator, seqs, [tokens])
    q, k, v = (torch.randn(tokens, heads, dim) * size for size in (1, 30, 1e5))
    module = PagedAttention(heads, dim, layout=layout)
    out = module(q, k, v, *caches, metadata, k_scale=scales[0], v_scale=scales[1])
    sizes = [x.abs().amax(-1, keepdim=True) / 448 for x in (k, v)]
    k_rounded, v_rounded = (
        (x / size).to(FLOAT8).float() * size for x, size in zip((k, v), sizes, strict=True)
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k_rounded, v_rounded)), is_causal=True
    ).transpose(0, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1.0)
    block, slot = divmod(int(metadata.slot_mapping[3]), 4)
    assert scales[0][block, 1, slot] == k[3, 1].abs().max() / 448


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "num_heads must be at least 1, got 0"),
        ((4, 8, 3), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    ],
)
def test_module_errors(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PagedAttention(*arguments)
    with pytest.raises(ValueError, match="layout must be one of HND, NHD, got 'NCHW'"):
        PagedAttention(4, 8, layout="NCHW")


def test_owners() -> None:
    allocator = BlockAllocator(6, 4)
    seqs = allocator.allocate([8, 4])
    twin = allocator.fork(seqs[:1])
    owners, holders = block_owners(allocator, [*seqs.tolist(), *twin.tolist()])
    first, second = allocator.block_table(seqs)
    assert (owners[first] == 0).all()
    assert (holders[first] == 2).all()
    assert (owners[second[0]], holders[second[0]]) == (1, 1)
    assert (owners == FREE).sum() == 3
