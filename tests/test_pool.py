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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"num_blocks": 2, "memory": 3}, "give num_blocks or memory, not both, got 2 and 3"),
        ({"kv_dtype": torch.int8}, "kv_dtype must be one of float32, float16, bfloat16, got"),
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
