"""What the case table cannot see of the CPU kernels: instruction sets, threads, splits, bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import Case, Data, build
from op_oracle import assert_as_good_as_dense
from torch import Tensor

from pykvcache import ops

TESTS = Path(__file__).parent
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.skipif(ops.backends()["cpu"] != "ready", reason="_C is not built")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attend(data: Data, **changes: object) -> tuple[Tensor, Tensor]:
    return ops.paged_attention(*data.args, **{**data.kwargs, **changes}, backend="cpu")


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYKVCACHE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_case_table_on_every_instruction_set(isa: str) -> None:
    chosen = run_with(isa, "-c", "import torch, pykvcache._C as C; print(C.cpu_isa())")
    if chosen.stdout.strip() != isa:
        pytest.skip(f"this CPU runs {chosen.stdout.strip()} instead: {chosen.stderr[-200:]}")
    files = [str(TESTS / f"test_{name}.py") for name in ("paged_attention", "float8")]
    chosen_tests = "(case or codes) and cpu"
    run = run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen_tests)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


SPLIT_CASES = [
    Case("decode", rows=((1, 2000), (1, 3), (1, 700)), num_heads=8, num_kv_heads=4, head_dim=128),
    Case("speculative", rows=((3, 1500), (1, 600)), num_heads=12, num_kv_heads=4, head_dim=96),
    Case("sinks", rows=((1, 1900),), num_heads=8, num_kv_heads=8, head_dim=80, sinks=True),
    Case("window", rows=((2, 1999),), num_heads=4, num_kv_heads=4, head_dim=128, window=1300),
    Case("general", rows=((9, 1700),), num_heads=8, num_kv_heads=1, head_dim=64, sinks=True),
    Case("float8", ((2, 1900), (1, 90)), 8, 2, 72, dtype=BF16, cache_dtype=FP8, scales="slot"),
]


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_splits_are_as_good_as_dense(case: Case, count: int) -> None:
    """Long rows are cut for several threads, and at fixed positions when deterministic."""
    data = build(case)
    with threads(count):
        for deterministic in (False, True):
            assert_as_good_as_dense(case, data, *attend(data, deterministic=deterministic))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_deterministic_bits_do_not_depend_on_the_thread_count(
    case: Case, dtype: torch.dtype
) -> None:
    data = build(replace(case, dtype=dtype))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(attend(data, deterministic=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_length_between_nan_neighbours(block_size: int, dtype: torch.dtype) -> None:
    """Lengths of every residue: pairs, token groups and tiles all end in the middle once."""
    rows = tuple((1, length) for length in range(1, 70))
    case = Case("lengths", rows, head_dim=33, v_head_dim=65, block_size=block_size, dtype=dtype)
    data = build(case)
    assert_as_good_as_dense(case, data, *attend(data))


STREAMED = [(torch.float32, 64), (torch.bfloat16, 256), (torch.float16, 128), (torch.bfloat16, 64)]


@pytest.mark.parametrize(("dtype", "head_dim"), STREAMED, ids=str)
@pytest.mark.parametrize("block_size", [16, 24, 32, 64, 80])
def test_every_length_of_two_streams(block_size: int, dtype: torch.dtype, head_dim: int) -> None:
    """One query row a KV head: two blocks at a time, and every way in which the last two end."""
    lengths = [*range(1, 70), 127, 128, 129, 159, 160, 161, 255, 257]
    rows = tuple((1, length) for length in lengths)
    case = Case(
        "streams", rows, num_heads=5, num_kv_heads=5, head_dim=head_dim, block_size=block_size,
        dtype=dtype,
    )  # fmt: skip
    data = build(case)
    assert_as_good_as_dense(case, data, *attend(data))


@pytest.mark.parametrize(
    "feature",
    [
        {"window": 37},
        {"chunk": 48},
        {"softcap": 20.0},
        {"sinks": True},
        {"alibi": True},
        {"num_heads": 1, "num_kv_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3])
def test_streams_with_features(feature: dict[str, Any], count: int) -> None:
    shape = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "block_size": 16} | feature
    case = Case("streams", rows=((1, 1501), (1, 40), (1, 7), (1, 333)), **shape)
    data = build(case)
    with threads(count):
        for deterministic in (False, True):
            assert_as_good_as_dense(case, data, *attend(data, deterministic=deterministic))


def test_repeated_calls_reuse_scratch_of_any_size() -> None:
    """Buffers live as long as a thread: a small call after a large one must not see its rests."""
    large = build(SPLIT_CASES[0])
    small_case = Case("small", rows=((1, 5), (2, 9)), head_dim=24)
    small = build(small_case)
    expected = attend(small)
    attend(large)
    for _ in range(3):
        got = attend(small)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert_as_good_as_dense(small_case, small, *got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({4: torch.tensor([9, -1], dtype=torch.int32)}, r"seq_lens\[1\] must not be negative"),
        ({4: torch.tensor([9, 99], dtype=torch.int32)}, r"seq_lens\[1\] is 99 but block_table"),
        ({5: torch.tensor([0, 4, 3], dtype=torch.int32), 6: 4}, "must not fall: .* row 1"),
        ({5: torch.tensor([1, 2, 3], dtype=torch.int32)}, "cu_seqlens_q must start at 0, got 1"),
        ({6: 1}, "max_seqlen_q is 1 but row 0 has 2 queries"),
    ],
)
def test_bad_lengths_name_the_row(change: dict[int, object], message: str) -> None:
    data = build(Case("bad", rows=((2, 9), (1, 5)), block_size=4))
    args = [change.get(i, arg) for i, arg in enumerate(data.args)]
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(*args, **data.kwargs, backend="cpu")


def test_block_id_below_minus_one_is_refused() -> None:
    data = build(Case("bad", rows=((1, 9),), block_size=4))
    data.args[3][0, 1] = -2
    with pytest.raises(ValueError, match="block_table has block -2 in row 0 but k_cache has 6"):
        attend(data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", (1, 40))
def test_nan_in_a_valid_slot_is_not_hidden(dtype: torch.dtype, queries: int) -> None:
    k_cache, v_cache = torch.randn(2, 4, 2, 16, 32).to(dtype).unbind()
    k_cache[2, 1, 3] = torch.nan  # position 19 of KV head 1
    q = torch.randn(queries, 4, 32).to(dtype)
    lengths = torch.tensor([48], dtype=torch.int32), torch.tensor([0, queries], dtype=torch.int32)
    table = torch.tensor([[0, 2, 3]], dtype=torch.int32)
    out, _ = ops.paged_attention(q, k_cache, v_cache, table, *lengths, queries, backend="cpu")
    sees = torch.arange(48 - queries, 48) >= 19
    assert out[sees][:, 2:].isnan().all()
    assert not out[:, :2].isnan().any()
    assert not out[~sees].isnan().any()
