"""`LayerStep` gives the bits of the operators, follows its bindings and declines the rest."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from pykvcache import ops
from pykvcache.layer_step import LayerStep
from pykvcache.metadata import AttentionMetadata

pytestmark = pytest.mark.skipif(ops.backends()["cpu"] != "ready", reason="_C is not built")

BLOCK_SIZE, HEADS, KV_HEADS, DIM, V_DIM = 4, 6, 2, 24, 40
LENGTHS = (1, 9, 23)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"window": 5},
    {"chunk": 8},
    {"sinks": torch.linspace(-1, 1, HEADS)},
]


class Layer:
    """Caches, metadata of a step, and new q, k and v as transformers lays them out."""

    def __init__(self, dtype: torch.dtype = torch.float32, num_blocks: int = 16) -> None:
        rows = len(LENGTHS)
        self.k_cache = torch.randn(num_blocks, KV_HEADS, BLOCK_SIZE, DIM).to(dtype)
        self.v_cache = torch.randn(num_blocks, KV_HEADS, BLOCK_SIZE, V_DIM).to(dtype)
        blocks = torch.randperm(num_blocks, dtype=torch.int32)[: rows * 5].view(rows, 5)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        blocks = blocks if num_blocks >= rows * 6 else blocks.sort().values
        table = torch.cat([blocks, blocks[:, :1]], dim=1)  # [B, 6]
        last = (lengths - 1).long()
        slots = table[torch.arange(rows), last // BLOCK_SIZE].long() * BLOCK_SIZE
        self.metadata = AttentionMetadata(
            table,
            lengths,
            torch.arange(rows + 1, dtype=torch.int32),
            1,
            slots + last % BLOCK_SIZE,
        )
        self.q = torch.randn(rows, 1, HEADS, DIM).to(dtype).transpose(1, 2)
        self.k = torch.randn(rows, 1, KV_HEADS, DIM).to(dtype).transpose(1, 2)
        self.v = torch.randn(rows, 1, KV_HEADS, V_DIM).to(dtype).transpose(1, 2)

    def bound(self) -> LayerStep:
        step = LayerStep()
        step.bind(self.k_cache, self.v_cache, self.metadata)
        return step

    def write_by_operator(self) -> tuple[Tensor, Tensor]:
        """Copies of the caches after `ops.write_kv`."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        slots = self.metadata.slot_mapping
        ops.write_kv(self.k.squeeze(2), self.v.squeeze(2), k_cache, v_cache, slots)
        return k_cache, v_cache

    def attend_by_operator(self, **options: Any) -> Tensor:
        m = self.metadata
        out, _ = ops.paged_attention(
            self.q.squeeze(2),
            self.k_cache,
            self.v_cache,
            m.block_table,
            m.seq_lens,
            m.cu_seqlens_q,
            1,
            **options,
        )
        return out.unsqueeze(1)


def attend(step: LayerStep, q: Tensor, **options: Any) -> Tensor | None:
    given = {"scale": None, "softcap": 0.0, "window": 0, "chunk": 0, "sinks": None} | options
    return step.attend(q, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
def test_bits_of_the_operators(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = Layer(dtype)
    step = layer.bound()
    k_cache, v_cache = layer.write_by_operator()
    assert not torch.equal(k_cache, layer.k_cache)
    assert step.write(layer.k, layer.v)
    torch.testing.assert_close(layer.k_cache, k_cache, rtol=0, atol=0)
    torch.testing.assert_close(layer.v_cache, v_cache, rtol=0, atol=0)
    out = attend(step, layer.q, **options)
    assert out is not None
    torch.testing.assert_close(out, layer.attend_by_operator(**options), rtol=0, atol=0)


def test_follows_other_caches_and_other_metadata() -> None:
    layer, grown = Layer(), Layer(num_blocks=32)
    step = layer.bound()
    assert step.is_bound(layer.k_cache, layer.metadata)
    step.bind(grown.k_cache, grown.v_cache, layer.metadata)
    assert not step.is_bound(layer.k_cache, layer.metadata)
    step.bind(grown.k_cache, grown.v_cache, grown.metadata)
    out = attend(step, grown.q)
    assert out is not None
    torch.testing.assert_close(out, grown.attend_by_operator(), rtol=0, atol=0)


def test_sees_metadata_that_changed_in_place() -> None:
    layer = Layer()
    step = layer.bound()
    before = attend(step, layer.q)
    layer.metadata.seq_lens -= 1
    after = attend(step, layer.q)
    assert before is not None and after is not None and not torch.equal(before, after)
    torch.testing.assert_close(after, layer.attend_by_operator(), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["dtype", "heads", "dim", "rows", "stride", "device", "subclass"])
def test_declines_what_the_operator_has_to_do(wrong: str) -> None:
    layer = Layer()
    step = layer.bound()
    k_cache = layer.k_cache.clone()

    def spoil(x: Tensor) -> Tensor:
        changes = {
            "dtype": lambda: x.double(),
            "heads": lambda: x[:, :-1],
            "dim": lambda: x[..., :-1],
            "rows": lambda: x[:-1],
            "stride": lambda: x.repeat_interleave(2, dim=3)[..., ::2],
            "device": lambda: x.to("meta"),
            "subclass": lambda: torch.nn.Parameter(x, requires_grad=False),
        }
        return changes[wrong]()

    assert not step.write(spoil(layer.k), layer.v)
    assert not step.write(layer.k, spoil(layer.v))
    assert torch.equal(layer.k_cache, k_cache)
    assert attend(step, spoil(layer.q)) is None


def test_declines_sinks_of_another_shape() -> None:
    layer = Layer()
    assert attend(layer.bound(), layer.q, sinks=torch.zeros(HEADS - 1)) is None
    assert attend(layer.bound(), layer.q, sinks=torch.zeros(2 * HEADS)[::2]) is None


def test_refuses_blocks_and_slots_outside_the_pool() -> None:
    layer = Layer()
    step = layer.bound()
    before = layer.k_cache.clone()
    layer.metadata.slot_mapping[-1] = layer.k_cache.shape[0] * BLOCK_SIZE
    with pytest.raises(ValueError, match=r"slot_mapping\[2\] is 64"):
        step.write(layer.k, layer.v)
    assert torch.equal(layer.k_cache, before)
    layer.metadata.block_table[1, 0] = layer.k_cache.shape[0]
    with pytest.raises(ValueError, match="block_table has block 16 in row 1"):
        attend(step, layer.q)


def test_copies_are_bound_to_nothing() -> None:
    layer = Layer()
    twin = copy.deepcopy(layer.bound())
    assert not twin.is_bound(layer.k_cache, layer.metadata)
    assert not twin.write(layer.k, layer.v)
    assert attend(twin, layer.q) is None


def test_supports_only_float_caches_on_the_cpu() -> None:
    cache = torch.zeros(2, 1, 4, 8)
    assert LayerStep.supports(cache)
    assert not LayerStep.supports(cache.to(torch.float8_e4m3fn))
    assert not LayerStep.supports(cache.to("meta"))


def test_deterministic_reaches_the_kernel() -> None:
    """Splits at fixed positions add in another order than one pass over a long row."""
    torch.manual_seed(0)
    length, size = 3000, 16
    k_cache, v_cache = torch.randn(2, 200, KV_HEADS, size, DIM).unbind()
    metadata = AttentionMetadata(
        torch.randperm(200, dtype=torch.int32)[None],
        torch.tensor([length], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        1,
        torch.tensor([0]),
    )
    q = torch.randn(1, HEADS, 1, DIM)
    outs = {}
    for deterministic in (False, True):
        step = LayerStep(deterministic)
        step.bind(k_cache, v_cache, metadata)
        out = attend(step, q)
        expected, _ = ops.paged_attention(
            q.squeeze(2), k_cache, v_cache, metadata.block_table, metadata.seq_lens,
            metadata.cu_seqlens_q, 1, deterministic=deterministic,
        )  # fmt: skip
        assert out is not None and torch.equal(out, expected.unsqueeze(1))
        outs[deterministic] = out
    assert not torch.equal(outs[False], outs[True])


@pytest.mark.parametrize(("dim", "v_dim"), [(577, 64), (1024, 64), (64, 640)])
def test_refuses_heads_that_are_too_wide(dim: int, v_dim: int) -> None:
    layer = Layer()
    k_cache, v_cache = torch.zeros(4, 1, 4, dim), torch.zeros(4, 1, 4, v_dim)
    with pytest.raises(ValueError, match=r"Dv? must be 1 to 576, got \d+"):
        LayerStep().bind(k_cache, v_cache, layer.metadata)


@pytest.mark.parametrize("wrong", [{"scale": float("nan")}, {"softcap": -1.0}])
def test_refuses_factors_that_the_operator_refuses(wrong: dict[str, Any]) -> None:
    layer = Layer()
    with pytest.raises(ValueError, match=r"(scale|softcap) must be finite"):
        attend(layer.bound(), layer.q, **wrong)


def test_does_not_keep_caches_alive() -> None:
    layer = Layer()
    step = layer.bound()
    views = [weakref.ref(layer.k_cache), weakref.ref(layer.v_cache)]
    del layer.k_cache, layer.v_cache
    assert [view() for view in views] == [None, None]
    assert not step.is_bound(torch.zeros(1), layer.metadata)
