"""What the Triton launchers would compile on a GPU, without one: nothing forgotten, nothing twice.

In the interpreter kernels have no compiled form, so this file runs itself again without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import os
import pkgutil
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

if triton.knobs.runtime.interpret:

    def test_launches_in_a_process_without_the_interpreter() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "passed" in done.stdout and "skipped" not in done.stdout

else:
    import torch
    from pykvcache.kernels.launch import attention
    from triton_launches import TARGETS, noting_launches
    from triton_matrix import (
        BF16,
        FEATURES,
        FP8,
        attention_calls,
        launches_of,
        one_call_of_each_kind,
        quick_calls,
    )  # fmt: skip

    from pykvcache import kernels, ops

    # Constants that one launcher sets to one value, whatever it is called with.
    SINGLE = {"INTERPRETED", "PIECES", "copy_kernel.WIDTH"}

    def all_kernels() -> set[str]:
        found = set()
        for module in pkgutil.walk_packages(kernels.__path__, "pykvcache.kernels."):
            for name, value in vars(importlib.import_module(module.name)).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    found.add(name)
        return found

    @pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
    def test_the_matrix_has_every_kernel_and_every_constant(arch: str) -> None:
        launches = [launch for _, launch in launches_of(arch, list(attention_calls())).values()]
        assert {launch.name for launch in launches} == all_kernels()
        values: dict[str, set[object]] = {}
        for launch in launches:
            for parameter in launch.kernel.params:
                name, given = parameter.name, launch.signature[parameter.name]
                if parameter.is_constexpr:
                    seen = launch.constant(name)
                elif name in ("bias", "sinks", "alibi_slopes", "k_scale", "v_scale"):
                    seen = given
                else:
                    continue
                values.setdefault(f"{launch.name}.{name}", set()).add(seen)
        lonely = {
            name
            for name, seen in values.items()
            if len(seen) < 2 and name not in SINGLE and name.split(".")[1] not in SINGLE
        }
        assert not lonely, f"constants with one value only: {lonely}"

    def test_the_matrix_has_every_parameter_of_attention() -> None:
        parameters = inspect.signature(ops.paged_attention).parameters.values()
        options = {p.name for p in parameters if p.default is not inspect.Parameter.empty}
        # These change no constant, or are part of another feature.
        same = {"scale", "layout", "plan", "backend", "v_head_dim", "k_scale", "v_scale"}
        assert options - same <= set(FEATURES)
        for name, values in FEATURES.items():
            assert len(set(values)) > 1, name

    @pytest.mark.parametrize("arch", list(TARGETS))
    def test_the_quick_part_has_every_value(arch: str) -> None:
        for phase in ("decode", "prefill"):
            calls = [call for call in quick_calls(arch) if call.phase == phase]
            for name, values in FEATURES.items():
                assert {call.features[name] for call in calls} >= set(values), name

    @pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
    @pytest.mark.parametrize(("cache_dtype", "dim"), [(BF16, 64), (FP8, 64), (BF16, 72)])
    def test_other_batches_and_lengths_compile_nothing(
        arch: str, cache_dtype: torch.dtype, dim: int
    ) -> None:
        """Batch sizes, table widths, token counts, windows and views at odd addresses: one kernel,
        also where decode has row tiles.

        Pools keep their layout; a pool may grow.
        """
        keys = []
        sizes = (
            (1, 1, 1, 1), (16, 16, 64, 16), (3, 7, 17, 5), (17, 33, 1000, 1), (256, 128, 9999, 2),
        )  # fmt: skip
        for processors, (rows, width, blocks, queries) in itertools.product((0, 132), sizes):
            for shift in (0, 1):
                with noting_launches(arch, processors) as noted:
                    one_call_of_each_kind(cache_dtype, rows, width, blocks, queries, shift, dim)
                keys.append({launch.key for launch in noted})
        names = {key.split()[0] for key in keys[1]}
        assert names == all_kernels() - (
            {"fill_channel_scales_kernel"} if cache_dtype == BF16 else set()
        )
        for number, other in enumerate(keys):
            assert other <= keys[2], f"call {number} compiles {other - keys[2]}"

    def test_strides_of_pools_keep_wide_loads() -> None:
        """A multiple of 16 in a stride or in the elements of a block is known to the compiler."""
        with noting_launches("sm_90") as noted:
            one_call_of_each_kind(BF16, 3, 7, 17, 5, 0)
        wide = {
            "decode_kernel": ("k_stride_slot", "v_stride_slot", "stride_q_head"),
            "prefill_kernel": ("k_stride_slot", "v_stride_slot", "stride_q_head"),
            "copy_kernel": ("elements", "src_stride", "dst_stride"),
            "write_kernel": ("stride_slot", "stride_token", "stride_head"),
            "gather_kernel": ("stride_slot",),
        }
        for launch in noted:
            for name in wide.get(launch.name, ()):
                attributes = launch.attributes[(launch.kernel.arg_names.index(name),)]
                assert ["tt.divisibility", 16] in attributes, f"{launch.name} {name}"

    def test_many_heads_of_a_kv_head_are_split() -> None:
        assert [attention.head_split(heads, 128) for heads in (1, 8, 64, 71, 128)] == [
            1, 1, 1, 1, 2,
        ]  # fmt: skip
        assert attention.head_split(128, 576) == 8
        for heads in range(1, 129):
            for dim in (64, 128, 256, 576):
                assert heads % attention.head_split(heads, dim) == 0
