"""Benchmarks of kernels: the work of a case, complete results, and no figure of a wrong one."""

from __future__ import annotations

import pytest
import torch

from pykvcache.bench import cases, kernels, peaks, tables, tensors
from pykvcache.bench.cases import Case, Heads
from pykvcache.bench.timing import Timing, WrongResult

SMALL = Heads("small", 4, 2, 16)


def test_work_of_a_case() -> None:
    decode = Case("decode", cases.HEADS["gqa"], torch.bfloat16, 8, 4096)
    assert decode.kv_bytes == 8 * 4096 * 2 * 8 * 128 * 2
    prefill = Case("prefill", cases.HEADS["mha"], torch.float32, 1, 2048)
    assert prefill.flops == 2 * 2048**2 * 64 * 16  # causal: 2 L^2 D HQ
    assert {case.phase for case in cases.select(quick=True)} == {"decode", "prefill"}
    assert len(cases.select()) > len(cases.select(quick=True))


def test_rows_of_different_lengths() -> None:
    (long,), (_, both) = (
        cases.select(("decode",), ("gqa8",), ("fp8",), rows=cases.read_rows(text))
        for text in ("32x4096", "2x64,1x131072+31x4096")
    )
    assert (long.name, long.mixed) == ("decode gqa8 fp8 B=32 L=4096", ())
    assert both.name == "decode gqa8 fp8 B=32 L=1x131072+31x4096"
    assert (both.batch, both.length, both.lengths[:2]) == (32, 131072, [131072, 4096])
    assert both.kv_bytes == (131072 + 31 * 4096) * 2 * 4 * 128
    assert both.flops == 4 * (131072 + 31 * 4096) * 32 * 128
    assert tensors.pool_bytes(Case.of("decode", SMALL, torch.bfloat16, ((1, 17), (2, 3))), 16) == (
        (32 + 2 * 16) * 2 * 2 * 16 * 2
    )
    with pytest.raises(ValueError, match="different lengths"):
        cases.select(("prefill",), rows=cases.read_rows("1x64+1x32"))
    for text in ("", "4096", "0x32", "1x2+", "1x2,,3x4", "1x2+3"):
        with pytest.raises(ValueError, match="rows must look like"):
            cases.read_rows(text)


def test_chunks_are_checked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "COLD_BYTES", 2**16)
    case = Case("chunk", SMALL, torch.float32, 2, 100, 30)
    kernels.Workload(case, [16]).check()
    assert case.flops == 4 * 2 * sum(range(71, 101)) * 4 * 16


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch):
    """Cases that take milliseconds, over three copies."""
    monkeypatch.setattr(peaks, "READ_BYTES", 2**20)
    monkeypatch.setattr(peaks, "GEMM_SIZE", 64)

    def make(phase: str, dtype: torch.dtype) -> Case:
        case = Case(phase, SMALL, dtype, 2, 80)
        monkeypatch.setattr(tensors, "COLD_BYTES", 3 * case.kv_bytes)
        monkeypatch.setitem(cases.DTYPES, "test", dtype)
        return case

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_kernel_results_are_checked_and_complete(small_case, phase: str, dtype) -> None:
    results = list(kernels.measure(small_case(phase, dtype), [16, 32], [1], seconds=0.01))
    names = [result.contender for result in results]
    folded = ["folded"] if phase == "decode" else []
    loads = ["loads in order", "loads 16", "loads 32"] if phase == "decode" else []
    assert names == ["sdpa", *folded, "paged 16", "paged 32", *loads]
    baseline = next(r for r in results if r.contender == ("folded" if folded else "sdpa"))
    assert baseline.speedup == 1
    for result in results:
        work = result.case.kv_bytes if phase == "decode" else result.case.flops
        assert result.rate == pytest.approx(work / result.timing.median)
        assert result.to_json()["threads"] == 1


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_mixed_rows_are_checked_and_complete(small_case, dtype: str) -> None:
    small_case("decode", cases.DTYPES[dtype])
    case = Case.of("decode", SMALL, cases.DTYPES[dtype], ((1, 300), (2, 70), (1, 1)))
    peers = ("flex", "flashinfer")
    missing: dict[str, str] = {}
    results = list(kernels.measure(case, [1, 16], [1], 0.01, peers=peers, missing=missing))
    names = ["sdpa", "folded", "paged 1", "paged 16", "loads in order", "loads 1", "loads 16"]
    assert [result.contender for result in results] == names
    row = results[2].to_json()
    assert (row["mixed"], row["batch"], row["dtype"]) == ("1x300+2x70+1x1", 4, dtype)
    assert missing["flex"].startswith("takes rows" if dtype == "fp16" else "takes no float8")


def test_a_plan_has_a_time_and_no_rate() -> None:
    case = Case("decode", SMALL, torch.bfloat16, 2, 80)
    found = kernels.Result(case, 0, "plan triton", Timing(1e-6, 1e-6, 1e-6, 3), 0.0, 1e9, 9.0)
    row = found.to_json()
    assert (row["gb_per_second"], row["gflop_per_second"], row["rate"]) == (0, 0, 0)
    assert [*tables.kernel_table([found]).columns[-1].cells] == [""]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_wrong_kernel_gets_no_figure(
    small_case, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    attention = kernels.ops.paged_attention

    def slightly_wrong(*arguments, backend, **options):
        out, lse = attention(*arguments, backend=backend, **options)
        if backend != "reference":
            out[-1, -1, -1] += 0.01
        return out, lse

    monkeypatch.setattr(kernels.ops, "paged_attention", slightly_wrong)
    results = kernels.measure(small_case(phase, torch.float32), [16], [1], seconds=0.01)
    with pytest.raises(WrongResult, match=f"{phase} small .* paged 16 is off by 0.01"):
        next(results)


def test_nan_is_a_wrong_result(small_case, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = kernels.Workload(small_case("decode", torch.float32), [16])
    workload.contenders["paged 16"] = lambda _: torch.full_like(workload.packed_q, torch.nan)
    with pytest.raises(WrongResult, match="off by nan"):
        workload.check()


def test_paged_and_dense_copies_are_all_the_same(small_case) -> None:
    workload = kernels.Workload(small_case("decode", torch.float32), [16])
    assert workload.copies == 3
    outputs = [workload.contenders["paged 16"](call) for call in range(3)]
    for out in outputs[1:]:
        assert torch.equal(out, outputs[0])
