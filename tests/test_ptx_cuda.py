"""The CUDA kernels as a GPU would run them: nvcc's PTX, launched by the real launchers.

tests/cuda_host runs the same sources as host C++, where PTX instructions are functions; here is
what nvcc has made of them, executed by tests/ptx_machine. `python tests/ptx_machine/run.py
--backend cuda --all` runs the whole case table that way.

A process has one form of the backend only, so this file runs itself again for the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_resources import find_nvcc

if find_nvcc() is None:
    pytest.skip("there is no CUDA toolkit", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU to run kernels on", allow_module_level=True)

ARCH = os.environ.get("PYKVCACHE_PTX_ARCH", "")

if not ARCH:
    PARTS = {"sm_80": "not wgmma", "sm_90a": "wgmma"}

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", PARTS)
    def test_on_the_machine(arch: str) -> None:
        script = Path(__file__).with_name("ptx_machine") / "run.py"
        command = [sys.executable, str(script), "--backend", "cuda", "--arch", arch]
        command += ["-k", PARTS[arch]]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout

else:
    from ptx_machine import cuda_driver

    from pykvcache import ops

    cuda_driver.load()

    import test_cache_ops as cache_tests
    from op_cases import BF16, F16, Case, build
    from op_oracle import assert_as_good_as_dense
    from ptx_machine.fault import Fault

    FP8 = torch.float8_e4m3fn
    # Decode alone, in pieces; prefill; no queries; no keys; more queries than keys (padding).
    ROWS = ((1, 330), (20, 75), (0, 9), (1, 0), (12, 5), (3, 17))
    FEW = ((1, 70), (20, 40))
    CASES = [
        Case("plain", ROWS, 8, 2, 64, dtype=BF16, strided_q=True),
        Case("fp16", FEW, 2, 2, 64, block_size=1, dtype=F16, window=30, softcap=3.0, sinks=True),
        Case("alibi", FEW, 7, 1, 48, block_size=3, dtype=BF16, alibi=True, chunk=24),
        Case("fp8-head", ROWS, 4, 1, 64, dtype=BF16, cache_dtype=FP8, scales="head",
             holes=((0, 1), (0, 2), (1, 0))),
        Case("fp8-slot", FEW, 4, 2, 64, block_size=3, dtype=F16, cache_dtype=FP8, scales="slot",
             bias="bool", causal=False),
        Case("bias", FEW, 4, 2, 64, dtype=BF16, bias="float", block_size=64, layout="NHD"),
        Case("dim 80", FEW, 4, 1, 80, 64, dtype=BF16, latent=True),
        Case("float", ((1, 40), (3, 21)), 2, 1, 20),
        Case("channel", ((1, 40), (3, 21)), 2, 1, 40, dtype=BF16, cache_dtype=FP8,
             scales="channel"),
    ]  # fmt: skip

    @pytest.fixture(autouse=True)
    def launches() -> Iterator[cuda_driver.Launches]:
        """On the machine; what torch.empty gives is NaN, so that what nobody writes shows."""
        torch.use_deterministic_algorithms(True)
        with cuda_driver.playing(ARCH) as found:
            yield found
        torch.use_deterministic_algorithms(False)

    def attend(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        data = build(case)
        out, lse = ops.paged_attention(*data.args, **data.kwargs, **options, backend="cuda")
        assert_as_good_as_dense(case, data, out, lse)
        return out, lse

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_attention(case: Case, launches: cuda_driver.Launches) -> None:
        attend(case)
        plain = case.name in ("float", "channel")
        wanted = {"plain_kernel"} if plain else {"decode_kernel", "prefill_kernel", "plan_kernel"}
        assert wanted <= {name.partition("<")[0] for name in launches.kernels}

    def test_any_order_of_ctas(launches: cuda_driver.Launches) -> None:
        case = Case("order", ((1, 330), (1, 9), (2, 130)), 8, 2, 64, dtype=BF16)
        first = attend(case)
        assert any(name.startswith("merge_pieces") for name in launches.kernels)
        for launches.seed in (1, 2):
            again = attend(case)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

    def test_deterministic() -> None:
        """A row has the same bits without the others."""
        case = Case("fixed", ((1, 1100), (1, 40)), 8, 2, 64, dtype=BF16)
        data = build(case)
        out, _ = attend(case, deterministic=True)
        q, k_cache, v_cache, table, lengths, _, _ = data.args
        starts = torch.tensor([0, 1]).int()
        alone, _ = ops.paged_attention(
            q[1:], k_cache, v_cache, table[1:], lengths[1:], starts, 1, **data.kwargs,
            deterministic=True, backend="cuda",
        )  # fmt: skip
        assert torch.equal(alone, out[1:])

    @pytest.mark.parametrize("dtype", [torch.float32, F16])
    @pytest.mark.parametrize("block_size", [1, 16])
    def test_write_then_gather(dtype: torch.dtype, block_size: int) -> None:
        cache_tests.test_write_then_gather_is_identity("cuda", "HND", dtype, block_size)

    def test_the_other_operators() -> None:
        cache_tests.test_write_skips_minus_one("cuda")
        cache_tests.test_write_without_values("cuda")
        cache_tests.test_copy_blocks("cuda", BF16)

    WGMMA_CASES = [
        Case("plain", ((20, 300), (1, 20)), 8, 2, 64, dtype=BF16),
        Case("blocks of 3", ((20, 150), (70, 70)), 4, 2, 64, block_size=3, dtype=BF16),
        Case("all", ((60, 500), (9, 5)), 4, 1, 40, block_size=48, dtype=F16, window=150,
             softcap=2.0, sinks=True, holes=((0, 8), (1, 0))),
    ]  # fmt: skip

    @pytest.mark.parametrize("case", WGMMA_CASES, ids=str)
    def test_wgmma(
        case: Case, launches: cuda_driver.Launches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "wgmma")
        attend(case)
        assert any(name.startswith("wgmma_kernel") for name in launches.kernels)

    @pytest.mark.parametrize(
        ("pattern", "to", "message"),
        [
            (r"wgmma\.wait_group\.sync\.aligned \d+;", "", "wgmma|Mismatch|not close"),
            (r"mbarrier\.try_wait[^;]*;", "setp.eq.b32 p, 0, 0;", "is writing|more arrivals"),
            (r"fence\.proxy\.async\.shared::cta;", "", "without fence.proxy.async"),
        ],
    )
    def test_wgmma_without_waits_is_seen(
        pattern: str, to: str, message: str, launches: cuda_driver.Launches,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("PYKVCACHE_CUDA_PREFILL", "wgmma")
        launches.change = changed("wgmma_kernel", pattern, to)
        with pytest.raises((Fault, AssertionError), match=message):
            attend(WGMMA_CASES[0 if "mbarrier" in pattern else 1])

    # What the machine would see if the kernels were wrong.

    def changed(kernel: str, pattern: str, to: str) -> Callable[[str, str], str]:
        def change(name: str, text: str) -> str:
            if not name.startswith(kernel):
                return text
            text, count = re.subn(pattern, to, text)
            assert count
            return text

        return change

    @pytest.mark.parametrize(
        ("kernel", "pattern", "message"),
        [
            ("prefill_kernel", r"bar\.sync\s+0;", "race|cp.async|nobody wrote"),
            ("decode_kernel", r"cp\.async\.wait_group \d+;", "cp.async is writing|nobody wrote"),
        ],
    )
    def test_missing_waits_are_seen(
        launches: cuda_driver.Launches, kernel: str, pattern: str, message: str
    ) -> None:
        launches.change = changed(kernel, pattern, "")
        with pytest.raises(Fault, match=message):
            attend(replace(CASES[0], rows=FEW))
