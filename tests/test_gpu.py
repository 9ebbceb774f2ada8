"""What only a GPU can show: graphs, no waiting, no recompilation, huge pools, models on CUDA.

The case table runs there too (test_paged_attention.py, test_cache_ops.py); these are the rest.
Prefill with wgmma has a file and a process of its own, test_cuda_wgmma.py: it is new to GPUs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pykvcache
from pykvcache import ops

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
BACKENDS = [name for name in ("triton", "cuda") if ops.backends()[name] == "ready"]
HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 64, 16


@pytest.fixture(autouse=True)
def _move_to_gpu() -> None:
    """Tensors are on the GPU already: conftest's fixture of this name has nothing to do."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Pool:
    """Sequences of a decode loop, blocks reserved ahead, all on the GPU."""

    def __init__(self, batch: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> None:
        cells = (batch * columns, KV_HEADS, BLOCK, DIM)
        self.k_cache = torch.full(cells, torch.nan, dtype=dtype, device="cuda")
        self.v_cache = self.k_cache.clone()
        blocks = torch.randperm(batch * columns).int().view(batch, columns)
        self.block_table = blocks.cuda()
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device="cuda")

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, backend: str, deterministic: bool = False
    ) -> Tensor:
        """Append one token a row and attend: [B, HQ, D]."""
        self.seq_lens += 1
        where = (self.block_table, self.seq_lens, self.cu_seqlens_q)
        slots = ops.slot_mapping(*where, len(q), BLOCK, backend=backend)
        ops.write_kv(k, v, self.k_cache, self.v_cache, slots, backend=backend)
        heads = (HEADS, KV_HEADS, DIM)
        how = {"deterministic": deterministic, "backend": backend}
        plan = ops.plan(self.seq_lens, self.cu_seqlens_q, 1, *heads, **how)
        caches = (self.k_cache, self.v_cache)
        return ops.paged_attention(q, *caches, *where, 1, plan=plan, **how)[0]


def draw(batch: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, HEADS, DIM), (batch, KV_HEADS, DIM), (batch, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes)
    return q, k, v


def dense(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[B, HQ, D] over keys and values [B, L, HKV, D], in float32."""
    k = keys.float().repeat_interleave(HEADS // KV_HEADS, 2)
    v = values.float().repeat_interleave(HEADS // KV_HEADS, 2)
    scores = torch.einsum("bhd,blhd->bhl", q.float(), k) * DIM**-0.5
    return torch.einsum("bhl,blhd->bhd", scores.softmax(-1), v)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_decode_step_is_replayed_a_thousand_times(backend: str, deterministic: bool) -> None:
    batch, steps = 5, 1000
    pool = Pool(batch, columns=-(-(steps + 3) // BLOCK))
    q, k, v = draw(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pool.step(q, k, v, backend, deterministic)
    torch.cuda.current_stream().wait_stream(stream)
    pool.seq_lens.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pool.step(q, k, v, backend, deterministic)
    keys, values = [], []
    for step in range(steps):
        for target, source in zip((q, k, v), draw(batch), strict=True):
            target.copy_(source)
        keys.append(k.clone())
        values.append(v.clone())
        graph.replay()
        if step % 97 == 0 or step == steps - 1:
            expected = dense(q, torch.stack(keys, 1), torch.stack(values, 1))
            torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.01)


def test_no_operator_waits_for_the_gpu(backend: str) -> None:
    pool = Pool(4, columns=8)
    inputs = draw(4)
    pool.step(*inputs, backend)  # compiled before
    pairs = torch.tensor([[0, 1]], device="cuda")
    ends = torch.arange(5, dtype=torch.int32, device="cuda") * 2
    outs, lses = torch.randn(3, 4, HEADS, DIM, device="cuda"), torch.randn(3, 4, HEADS).cuda()
    for length in (2, 3):
        key_ends = torch.arange(5, dtype=torch.int32, device="cuda") * length
        with no_waiting():
            pool.step(*inputs, backend)
            ops.merge_states(outs, lses, backend=backend)
            ops.copy_blocks([pool.k_cache], [pool.k_cache], pairs, backend=backend)
            ops.gather_kv(
                pool.k_cache, pool.v_cache, pool.block_table, pool.seq_lens, key_ends, 4 * length,
                backend=backend,
            )  # fmt: skip
            q = inputs[0].repeat(2, 1, 1)
            caches = (pool.k_cache, pool.v_cache)
            where = (pool.block_table, pool.seq_lens, ends)
            ops.paged_attention(q, *caches, *where, 2, backend=backend)  # two tokens a row


@pytest.mark.skipif("triton" not in BACKENDS, reason="the Triton backend is not ready")
def test_other_batches_and_lengths_compile_nothing() -> None:
    import triton

    compiled: list[Any] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs)
    try:
        for batch, columns in ((1, 4), (16, 4), (3, 33), (17, 7), (64, 16)):
            pool = Pool(batch, columns)
            for _ in range(3):
                pool.step(*draw(batch), "triton")
            q = torch.randn(batch * 5, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
            pool.seq_lens.fill_(37)
            ends = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * 5
            caches, where = (pool.k_cache, pool.v_cache), (pool.block_table, pool.seq_lens, ends)
            ops.paged_attention(q, *caches, *where, 5, backend="triton")
            if batch == 1:
                compiled.clear()
        assert not compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def test_pools_of_more_than_two_billion_elements(backend: str) -> None:
    num_blocks = 2**31 // (KV_HEADS * BLOCK * DIM) + 70_000  # ids above 65,535, offsets above 2**31
    free = torch.cuda.mem_get_info()[0]
    if free < 5 * num_blocks * KV_HEADS * BLOCK * DIM:
        pytest.skip(f"needs 10 GiB of GPU memory, {free / 2**30:.1f} are free")
    pool = Pool(2, columns=4)
    cells = (num_blocks, KV_HEADS, BLOCK, DIM)
    pool.k_cache = torch.empty(cells, dtype=torch.bfloat16, device="cuda")
    pool.v_cache = torch.empty(cells, dtype=torch.bfloat16, device="cuda")
    pool.block_table = (num_blocks - 1 - pool.block_table * 7).int()
    keys, values = [], []
    for _ in range(40):
        q, k, v = draw(2)
        keys.append(k)
        values.append(v)
        out = pool.step(q, k, v, backend)
    expected = dense(q, torch.stack(keys, 1), torch.stack(values, 1))
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.01)


def test_another_stream_is_used(backend: str) -> None:
    pool = Pool(3, columns=20)
    steps = [draw(3) for _ in range(30)]
    expected = [pool.step(*inputs, backend) for inputs in steps]
    pool.seq_lens.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [pool.step(*inputs, backend) for inputs in steps]
    torch.cuda.current_stream().wait_stream(stream)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01)


def test_auto_takes_the_compiled_kernels() -> None:
    wanted = "cuda" if "cuda" in BACKENDS else "triton"
    assert ops.table("auto", "cuda").backend == wanted


# Models.

sys.path.insert(0, str(Path(__file__).parent / "hf"))
PROMPTS = ([5, 9, 11], list(range(3, 40)), [7] * 20)


def families() -> list[str]:
    from families import FAMILIES

    return [name for name in FAMILIES if name not in ("whisper", "t5", "bart")]


@pytest.mark.parametrize("family", families())
def test_models_generate_what_they_did(family: str, backend: str) -> None:
    from families import make_model

    model = copy.deepcopy(make_model(family)).cuda()
    prompt = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]], device="cuda")
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(prompt, **settings)
    with pykvcache.patched(model, block_size=4, backend=backend):
        assert model.generate(prompt, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama4", "qwen3_moe", "gpt2"])
def test_engines_generate_what_generate_does(family: str, cuda_graphs: bool, backend: str) -> None:
    from families import make_model

    model = copy.deepcopy(make_model(family)).cuda()
    engine = pykvcache.Engine(
        model, block_size=4, num_blocks=300, backend=backend, cuda_graphs=cuda_graphs
    )
    outputs = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = model.generate(
            torch.tensor([prompt], device="cuda"), max_new_tokens=12, do_sample=False
        )
        assert output.token_ids == tokens[0, len(prompt) :].tolist()
    graphs = engine._runner.graphs
    assert (graphs is not None) == cuda_graphs
