"""The Triton kernels as a GPU would run them: their PTX, launched by the real launchers.

The machine in tests/ptx_machine executes what Triton compiles for a chip that is not here, on CPU
tensors. It sees what the interpreter hides: 32-bit overflow, accesses under wrong masks or at
addresses that are not aligned, missing barriers. `python tests/ptx_machine/run.py --all` runs the
whole case table that way.

In the interpreter kernels have no compiled form, so this file runs itself again without it.
"""

from __future__ import annotations

import importlib.util
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

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU to run kernels on", allow_module_level=True)

import triton

if triton.knobs.runtime.interpret:
    # Another chip has other instructions for a few things: those are run there too.
    PARTS = {"sm_80": "", "sm_90": "plain or fp8-h or fp8-s or latent or quantised"}

    @pytest.mark.slow
    @pytest.mark.parametrize("arch", PARTS)
    def test_on_the_machine(arch: str) -> None:
        script = Path(__file__).with_name("ptx_machine") / "run.py"
        command = [sys.executable, str(script), "--arch", arch, "-k", PARTS[arch]]
        done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout

else:
    from ptx_machine import triton_driver

    from pykvcache import operators, ops

    operators.LOADERS["cuda"] = lambda: "is not what is tested here"
    triton_driver.load()

    import test_cache_ops as cache_tests
    from op_cases import BF16, F16, F32, Case, build
    from op_oracle import assert_as_good_as_dense
    from ptx_machine.fault import Fault

    ARCH = os.environ.get("PYKVCACHE_PTX_ARCH", "sm_80")
    FP8 = torch.float8_e4m3fn
    # Decode alone, in pieces; prefill; no queries; no keys; more queries than keys (padding).
    ROWS = ((1, 330), (20, 75), (0, 9), (1, 0), (12, 5), (3, 17))
    CASES = [
        Case("plain", ROWS, 8, 2, 128, dtype=BF16, strided_q=True),
        Case("fp16", ROWS, 2, 2, 64, block_size=1, dtype=F16, window=30, softcap=3.0, sinks=True),
        Case("fp32", ROWS, 7, 1, 80, block_size=3, alibi=True, chunk=24),
        Case("fp8-head", ROWS, 4, 1, 64, dtype=BF16, cache_dtype=FP8, scales="head",
             holes=((0, 1), (0, 2), (1, 0))),
        Case("fp8-slot", ROWS, 4, 2, 64, block_size=3, dtype=BF16, cache_dtype=FP8, scales="slot",
             bias="bool", causal=False),
        Case("fp8-channel", ROWS, 4, 2, 64, block_size=64, dtype=F16, cache_dtype=FP8,
             scales="channel", bias="float"),
        Case("fp8-scalar", ROWS, 2, 1, 64, cache_dtype=FP8, scales="scalar"),
        Case("latent", ROWS, 4, 1, 80, 64, dtype=BF16, latent=True),
        Case("nhd", ROWS, 4, 2, 64, 96, dtype=F16, layout="NHD", block_size=64, causal=False),
        Case("all-holes", ((1, 40), (20, 40)), 8, 2, 128, dtype=BF16,
             holes=tuple((row, i) for row in (0, 1) for i in range(3))),
    ]  # fmt: skip

    @pytest.fixture(autouse=True)
    def _settings() -> Iterator[triton_driver.Settings]:
        """On the machine; what torch.empty gives is NaN, so that what nobody writes shows."""
        torch.use_deterministic_algorithms(True)
        with triton_driver.playing(ARCH) as settings:
            yield settings
        torch.use_deterministic_algorithms(False)

    def attend(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        data = build(case)
        out, lse = ops.paged_attention(*data.args, **data.kwargs, **options, backend="triton")
        assert_as_good_as_dense(case, data, out, lse)
        return out, lse

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_attention(case: Case, _settings: triton_driver.Settings) -> None:
        attend(case)
        assert {"decode_kernel", "prefill_kernel", "merge_kernel"} <= set(_settings.launches)

    def test_any_order_of_programs(_settings: triton_driver.Settings) -> None:
        case = CASES[0]
        first = attend(case)
        for _settings.seed in (1, 2):
            again = attend(case)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

    @pytest.mark.parametrize("programs", [1, 5])
    def test_rows_in_pieces(programs: int, _settings: triton_driver.Settings) -> None:
        _settings.programs, _settings.seed = programs, programs
        attend(replace(CASES[0], rows=((1, 700), (1, 0), (2, 130), (1, 64))))

    def test_deterministic(_settings: triton_driver.Settings) -> None:
        """A row has the same bits without the others."""
        case = Case("fixed", ((1, 1100), (1, 40)), 8, 2, 128, dtype=BF16)
        data = build(case)
        out, _ = attend(case, deterministic=True)
        q, k_cache, v_cache, table, lengths, _, _ = data.args
        starts = torch.tensor([0, 1]).int()
        alone, _ = ops.paged_attention(
            q[1:], k_cache, v_cache, table[1:], lengths[1:], starts, 1, **data.kwargs,
            deterministic=True, backend="triton",
        )  # fmt: skip
        assert torch.equal(alone[0], out[1])

    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_write_then_gather(dtype: torch.dtype) -> None:
        cache_tests.test_write_then_gather_is_identity("triton", "NHD", dtype, 3)

    @pytest.mark.parametrize("kind", ["scalar", "slot", "channel"])
    def test_write_quantised(kind: str) -> None:
        cache_tests.test_quantised_write_keeps_values_within_a_rounding("triton", kind)

    CACHE_TESTS: list[Callable[[str], None]] = [
        cache_tests.test_write_skips_minus_one,
        cache_tests.test_write_without_values,
        cache_tests.test_quantised_write_saturates,
        cache_tests.test_slot_mapping_of_padding_holes_and_spare_tokens,
        cache_tests.test_gather_gives_zeros_in_holes,
        cache_tests.test_copy_between_pools_of_different_size,
        lambda backend: cache_tests.test_copy_blocks(backend, FP8),
        lambda backend: cache_tests.test_merge_ignores_empty_partials(backend, F16),
    ]

    @pytest.mark.parametrize("test", CACHE_TESTS)
    def test_cache_operators(test: Callable[[str], None]) -> None:
        test("triton")

    # That the machine sees what is wrong: PTX with a line changed.

    def changed(kernel: str, pattern: str, by: str, number: int = 0) -> Callable[[str, str], str]:
        """Replace the occurrence `number` of a pattern in one kernel."""

        def change(name: str, ptx: str) -> str:
            if name != kernel:
                return ptx
            match = list(re.finditer(pattern, ptx))[number]
            return ptx[: match.start()] + match.expand(by) + ptx[match.end() :]

        return change

    def test_a_missing_mask_is_seen(_settings: triton_driver.Settings) -> None:
        _settings.change = changed("copy_kernel", r"@%p\d+ (ld\.global)", r"\1")
        pool = torch.randn(3, 1, 2, 12)
        with pytest.raises(Fault, match=r"copy_kernel, CTA .*\(copy.py:2\d\).* outside: thread"):
            ops.copy_blocks([pool], [pool], torch.tensor([[1, 2]]), backend="triton")

    @pytest.mark.parametrize("number", [2, 3, 4, 9])
    def test_a_missing_barrier_is_seen(number: int, _settings: triton_driver.Settings) -> None:
        _settings.change = changed("decode_kernel", r"bar\.sync[^;]*;", "", number)
        with pytest.raises(Fault, match="race: "):
            attend(CASES[0])

    def test_copies_that_nobody_waits_for_are_seen(_settings: triton_driver.Settings) -> None:
        _settings.change = changed("decode_kernel", r"cp\.async\.wait_group[^;]*;", "")
        with pytest.raises(Fault, match=r"cp\.async is writing"):
            attend(CASES[0])

    def far_write() -> None:
        """To the last block of a pool of over 2^31 elements, of which few pages are touched."""
        blocks, heads, size, dim = 2**31 // (8 * 16 * 128) + 2, 8, 16, 128
        pool = torch.empty(0, dtype=BF16).set_(
            torch.UntypedStorage(blocks * heads * size * dim * 2), 0, (blocks, heads, size, dim)
        )
        k = torch.randn(1, heads, dim).bfloat16()
        slots = torch.tensor([blocks * size - 1])
        ops.write_kv(k, k, pool, pool, slots, backend="triton")
        assert torch.equal(pool[-1, :, -1], k[0])

    def test_write_beyond_2_to_31_elements() -> None:
        far_write()
        # As if one of the products of strides were of 32 bits.
        product = r"mul\.lo\.s64 \t(%rd\d+),[^;]*;"
        narrow = r"\g<0> {.reg .b32 %low; cvt.u32.u64 %low, \1; cvt.s64.s32 \1, %low;}"
        seen = []
        for number in range(3):
            change = changed("write_kernel", product, narrow, number)
            with triton_driver.playing(ARCH, change=change):
                try:
                    far_write()
                except (Fault, AssertionError) as error:
                    seen.append(str(error))
        assert any("outside" in message for message in seen), seen
