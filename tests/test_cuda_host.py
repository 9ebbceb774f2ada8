"""The CUDA kernels as host C++: what the case table does not show, and the sanitizers.

The case table itself runs on backend "cuda" in test_paged_attention.py, test_cache_ops.py and
test_contract.py; see tests/cuda_host/build.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_host import build
from op_cases import BF16, F16, F32, Case
from op_cases import build as build_case
from op_oracle import assert_as_good_as_dense

from pykvcache import operators, ops
from pykvcache.bench import gpu
from pykvcache.bench.tune.explain import CallSpec

if operators.LOADERS["cuda"] is not build.load:
    pytest.skip("there is a GPU: nothing is emulated", allow_module_level=True)
if ops.backends()["cuda"] != "ready":
    pytest.skip(ops.backends()["cuda"], allow_module_level=True)

FP8 = torch.float8_e4m3fn
ASAN = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -DKV_HOST_THREADS"
# Cases of driver.cpp.
CASE_OF = {"decode": 4, "prefill": 0, "plain": 5, "wgmma": 6, "gather": 8, "plan": -1, "merge": 4}
OMITTABLE = {
    name
    for file in (build.ROOT / "csrc/cuda").glob("*.cuh")
    for name in re.findall(r" KV_OMITTABLE\((\w+),\s", file.read_text())
}
WAITS = {name for name in OMITTABLE if name.endswith("_wait")}
HOPPER_WAITS = {name for name in WAITS if name.startswith(("wgmma", "gather"))}
TSAN = "-O1 -fsanitize=thread -DKV_HOST_THREADS"


@pytest.fixture
def ctas() -> Iterator[None]:
    """Restores the number of CTAs that the emulated device runs at once."""
    yield
    build.control().kv_emulation_set_ctas(8)


@pytest.mark.usefixtures("ctas")
@pytest.mark.parametrize("count", [2, 6, 14, 100])
def test_a_launch_is_explained(count: int) -> None:
    """Units of 64 keys end to end, cut evenly over half of the CTAs: two KV heads."""
    from pykvcache import _C_cuda

    build.control().kv_emulation_set_ctas(count)
    lengths, bf16 = [700, 64, 1, 2000], 2
    units = [row for row, n in enumerate(lengths) for _ in range(-(-n // 64))]
    programs = min(count // 2, len(units))
    pieces = [set() for _ in lengths]
    for index, row in enumerate(units):
        begins = [program * len(units) // programs for program in range(programs)]
        pieces[row].add(sum(begin <= index for begin in begins))
    (found,) = _C_cuda.explain_launch(bf16, bf16, 8, 2, 128, 16, lengths, [1] * 4)
    assert found == {
        "kernel": "decode", "rows": 16, "tile": 64, "stages": 3, "threads": 128,
        "ctas": 2 * programs,
        "cut_rows": sum(len(numbers) > 1 for numbers in pieces),
        "most_splits": max(map(len, pieces)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kernel", "launch"),
    [
        ("B=2,L=300,HQ=8,HKV=2,D=128,q=100", "prefill", {"rows": 128, "tile": 64, "ctas": 16}),
        ("B=2,L=300,HQ=8,HKV=2,D=512", "plain", {"rows": 1, "ctas": 16}),
        ("B=2,L=300,HQ=8,HKV=2,D=64,dtype=fp32", "plain", {"rows": 1, "ctas": 16}),
        ("B=2,L=300,HQ=8,HKV=2,D=256", "decode", {"tile": 32, "threads": 64}),
    ],
)
def test_kernels_of_a_call_are_named(text: str, kernel: str, launch: dict[str, int]) -> None:
    found, numbers = gpu.describe_launch(CallSpec.parse(text), torch.device("cuda"), "cuda")
    assert found == f"{kernel} (csrc/cuda/{kernel}.cuh)"
    assert (build.ROOT / "csrc/cuda" / f"{kernel}.cuh").exists()
    assert launch.items() <= numbers.items()


def test_wgmma_is_explained_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CallSpec.parse("B=1,L=300,HQ=8,HKV=2,D=128,q=100")
    monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "wgmma")
    assert "wgmma_prefill" in gpu.describe_launch(call, torch.device("cuda"), "cuda")[0]


@pytest.fixture
def small_shared_memory() -> Iterator[None]:
    """99 KiB a CTA, as compute capability 8.6, 8.9 and 12.0 have it."""
    build.control().kv_emulation_set_shared_bytes(99 << 10)
    yield
    build.control().kv_emulation_set_shared_bytes(227 << 10)


@pytest.mark.usefixtures("small_shared_memory")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("storage", [None, FP8], ids=["same", "float8"])
def test_tensor_cores_serve_all_their_dims_in_99_kib(dim: int, storage: torch.dtype | None) -> None:
    case = Case("small", ((1, 700), (40, 50)), 8, 2, dim, dtype=BF16, cache_dtype=storage)
    data = build_case(case)
    before = build.control().kv_emulation_matrix_products()
    out, lse = ops.paged_attention(*data.args, **data.kwargs, backend="cuda")
    assert_as_good_as_dense(case, data, out, lse)
    assert build.control().kv_emulation_matrix_products() > before
    found, numbers = gpu.describe_launch(
        CallSpec.parse(f"B=2,L=300,HQ=8,HKV=2,D={dim}"), torch.device("cuda"), "cuda"
    )
    assert found.startswith("decode")
    assert numbers["stages"] == (2 if dim == 256 else 3)


@pytest.mark.usefixtures("ctas")
@pytest.mark.parametrize("count", [1, 2, 5, 64])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_any_number_of_ctas(count: int, dtype: torch.dtype) -> None:
    """Rows in one piece, in several, and pieces of several rows in one CTA."""
    build.control().kv_emulation_set_ctas(count)
    rows = ((1, 700), (1, 0), (2, 130), (1, 5), (0, 9), (1, 64))
    data = build_case(Case("pieces", rows=rows, sinks=True, dtype=dtype))
    expected = ops.paged_attention(*data.args, **data.kwargs, backend="reference")
    got = ops.paged_attention(*data.args, **data.kwargs, backend="cuda")
    tolerance = 1e-5 if dtype == F32 else 2e-2
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("storage", [None, FP8], ids=["same", "float8"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_tensor_cores_read_shared_memory_without_bank_conflicts(
    dim: int, storage: torch.dtype | None
) -> None:
    control = build.control()
    case = Case("banks", rows=((1, 70), (40, 90)), head_dim=dim, dtype=F16, cache_dtype=storage)
    data = build_case(case)
    conflicts, products = (
        control.kv_emulation_bank_conflicts(),
        control.kv_emulation_matrix_products(),
    )
    ops.paged_attention(*data.args, **data.kwargs, backend="cuda")
    assert control.kv_emulation_matrix_products() > products
    assert control.kv_emulation_bank_conflicts() == conflicts


@pytest.mark.parametrize(
    "case",
    [
        Case("float"),
        Case("wide", head_dim=320, dtype=BF16),
        Case("unaligned", head_dim=20, dtype=BF16),
        Case("channels", scales="channel", cache_dtype=FP8, dtype=BF16),
        Case("mixed", cache_dtype=F32, dtype=F16),
    ],
    ids=str,
)
def test_the_plain_kernel_takes_what_tensor_cores_do_not(case: Case) -> None:
    products = build.control().kv_emulation_matrix_products()
    data = build_case(case)
    ops.paged_attention(*data.args, **data.kwargs, backend="cuda")
    assert build.control().kv_emulation_matrix_products() == products


@pytest.fixture
def processors() -> Iterator[None]:
    """24, three quarters of them for the row tiles of all KV heads."""
    build.control().kv_emulation_set_processors(24)
    build.control().kv_emulation_set_ctas(48)
    yield
    build.control().kv_emulation_set_processors(0)
    build.control().kv_emulation_set_ctas(8)


def kernels_of(case: Case) -> list[str]:
    from pykvcache import _C_cuda

    lengths, queries = [kv for _, kv in case.rows], [q for q, _ in case.rows]
    found = _C_cuda.explain_launch(
        2, 2, case.num_heads, case.num_kv_heads, case.head_dim, 16, lengths, queries
    )
    return [launch["kernel"] for launch in found]


WIDE = [  # up to 18 columns
    Case("tail", ((30, 700),), 8, 2, 128),  # 120 rows, 8 tiles
    Case("odd-group", ((7, 300),), 10, 2, 64, window=90),  # 35 rows: tiles end within tokens
    Case("heads", ((3, 900),), 20, 1, 80, causal=False),
    Case("speculative", ((5, 400), (17, 333), (1, 64)), 4, 2, 128, sinks=True, softcap=20.0),
    Case("padded", ((12, 5), (12, 200)), 8, 2, 64, chunk=100, holes=((1, 3),)),
    Case("wide-heads", ((20, 260),), 4, 1, 256),
    Case("float8", ((9, 500),), 8, 2, 128, cache_dtype=FP8, scales="slot"),
    Case("bias", ((9, 150),), 8, 2, 64, bias="float", layout="NHD"),
]


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_a_few_long_tails_are_cut_along_their_keys(case: Case, planned: bool) -> None:
    case = replace(case, dtype=BF16)
    assert kernels_of(case) == ["decode"]
    data = build_case(case)
    plan = None
    if planned:
        plan = ops.plan(
            *data.args[4:7], case.num_heads, case.num_kv_heads, case.head_dim, window=case.window,
            chunk=case.chunk, backend="cuda",
        )  # fmt: skip
        assert plan.diff().min() > 0
    out, lse = ops.paged_attention(*data.args, **data.kwargs, plan=plan, backend="cuda")
    assert_as_good_as_dense(case, data, out, lse)


@pytest.mark.usefixtures("processors")
def test_other_tails_are_prefill() -> None:
    """Enough query tiles for all processors, more rows than prefill takes at once, fixed bits."""
    assert kernels_of(Case("many", ((30, 700),) * 3, 8, 2, 128)) == ["prefill"]
    assert kernels_of(Case("long", ((33, 700),), 8, 2, 128)) == ["prefill"]
    assert kernels_of(Case("mixed", ((1, 700), (300, 700)), 8, 2, 128)) == ["decode", "prefill"]
    data = build_case(Case("fixed", ((30, 700),), 8, 2, 128, dtype=BF16))
    how = {"backend": "cuda", "deterministic": True}
    assert ops.plan(*data.args[4:7], 8, 2, 128, **how).tolist() == [0, 0]
    alone, _ = ops.paged_attention(*data.args, **data.kwargs, **how)
    build.control().kv_emulation_set_processors(0)
    assert torch.equal(ops.paged_attention(*data.args, **data.kwargs, **how)[0], alone)


@pytest.mark.parametrize("deterministic", [False, True])
def test_plan_counts_the_units_of_decode_rows(deterministic: bool) -> None:
    unit = 1024 if deterministic else 64
    q_lens, lengths = [1, 4, 5, 0, 1, 1], [10 * unit, unit + 1, 3 * unit, 99, 0, 1]
    starts = torch.tensor([0, *q_lens]).cumsum(0).int()
    plan = ops.plan(
        torch.tensor(lengths).int(), starts, 5, 8, 2, 64, deterministic=deterministic,
        backend="cuda",
    )  # fmt: skip
    units = [10, 2, 0, 0, 1, 1]  # 5 queries of 4 heads are prefill's; 0 queries have no result
    assert plan.diff().tolist() == units and plan[0] == 0


def test_plan_of_many_rows_leaves_out_what_a_window_hides() -> None:
    rows = 700  # more than the threads of the kernel
    starts = torch.arange(rows + 1).int()
    plan = ops.plan(
        torch.full((rows,), 20 * 64).int(), starts, 1, 2, 2, 64, window=2 * 64, backend="cuda"
    )
    assert plan.tolist() == list(range(0, 2 * rows + 1, 2))


def run_driver(flags: str, *omission: str | int) -> subprocess.CompletedProcess[str]:
    """The driver's cases; `omission` is a barrier or wait to leave out, and the case to run."""
    try:
        program = build.driver(flags)
    except RuntimeError as error:
        if re.search(r"lib[at]san|lubsan|unsupported option|-l[at]san", str(error)):
            pytest.skip("the compiler has no sanitizers")
        raise
    command = [str(program), *map(str, omission)]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    options: dict[str, Any] = {"env": environment, "text": True, "capture_output": True}
    done = subprocess.run(command, timeout=500, **options)
    if "unexpected memory mapping" in done.stderr:  # older ThreadSanitizers and much randomness
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer does not run with this address space randomisation")
        done = subprocess.run(["setarch", "-R", *command], timeout=500, **options)
        if "setarch: failed" in done.stderr:
            pytest.skip("ThreadSanitizer does not run with this address space randomisation")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("flags", [ASAN, TSAN], ids=["address-undefined", "thread"])
def test_kernels_are_clean_under_sanitizers(flags: str) -> None:
    done = run_driver(flags)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("largest error") == 9


@pytest.mark.slow
@pytest.mark.parametrize("barrier", sorted(name for name in OMITTABLE if name.endswith("_barrier")))
def test_a_missing_barrier_is_a_race(barrier: str) -> None:
    """Every barrier of every kernel, left out in turn; a pointer read too early may crash first."""
    done = run_driver(TSAN, barrier, CASE_OF[barrier.split("_")[0]])
    # The models of Hopper's barriers notice some omissions themselves.
    assert done.returncode != 0 and re.search("data race|SEGV|cuda_host: mbarrier", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("wait", sorted(WAITS - HOPPER_WAITS))
def test_a_missing_wait_for_copies_is_a_wrong_result(wait: str) -> None:
    done = run_driver(ASAN, wait, CASE_OF[wait.split("_")[0]])
    assert done.returncode != 0 and "WRONG" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("wait", sorted(HOPPER_WAITS))
def test_a_missing_wait_of_wgmma_shows(wait: str) -> None:
    """For boxes, for consumers of a stage, for products: a race, or a wrong result."""
    done = run_driver(TSAN, wait, CASE_OF[wait.split("_")[0]])
    shown = re.search("data race|SEGV|cuda_host: ", done.stderr) or "WRONG" in done.stdout
    assert done.returncode != 0 and shown


def test_every_barrier_can_be_left_out() -> None:
    waits = r"__sync(threads|warp)\(|copy_wait<k|barrier_wait\([s&]|warpgroup_wait<\d>"
    bare = [
        line
        for file in (build.ROOT / "csrc/cuda").glob("*.cuh")
        for line in file.read_text().splitlines()
        if re.search(waits, line)
        and "KV_OMITTABLE" not in line
        and not line.lstrip().startswith("//")
    ]
    assert bare == []
    assert {"decode_wait", "prefill_wait", "decode_warp_barrier", "wgmma_full_wait"} < OMITTABLE
    assert "wgmma_empty_wait" in OMITTABLE
