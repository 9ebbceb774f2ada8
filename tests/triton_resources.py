"""Compile the Triton kernels for one GPU without having it; print what each needs of the chip.

    python tests/triton_resources.py sm_90 decode [shapes]

`shapes` leaves out the kernels for single features. One line a kernel: shared memory, registers and
spilled bytes (the last two read from the cubin with the cuobjdump that Triton brings; AMD code
objects have none). Exits with 1 if a kernel of head dim 64 or 128 spills, float32 aside.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from pykvcache.kernels.attention.decode import decode_kernel
from pykvcache.kernels.attention.merge import merge_kernel, merge_states_kernel
from pykvcache.kernels.attention.plan import plan_kernel
from pykvcache.kernels.attention.prefill import prefill_kernel
from pykvcache.kernels.cache.copy import copy_kernel, gather_kernel
from pykvcache.kernels.cache.write import (
    fill_channel_scales_kernel,
    slot_mapping_kernel,
    write_kernel,
)
from pykvcache.kernels.launch.operators import decode_rows, split_dim
from pykvcache.kernels.launch.table import choose
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# dtype of q and of the caches, head dim
SHAPES = [
    ("bf16", "bf16", 64),
    ("bf16", "bf16", 128),
    ("fp16", "fp16", 128),
    ("bf16", "u8", 64),
    ("bf16", "u8", 128),
    ("fp32", "fp32", 64),
    ("fp32", "fp32", 128),
    ("bf16", "bf16", 80),
    ("bf16", "bf16", 256),
    ("bf16", "bf16", 576),
    ("fp32", "fp32", 576),
]
OPTIONAL = ("sinks", "alibi_slopes", "bias", "k_scale", "v_scale")
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"HAS_WINDOW": True},
    "chunk": {"HAS_CHUNK": True},
    "softcap": {"HAS_SOFTCAP": True},
    "sinks": {"sinks": "*fp32"},
    "alibi": {"alibi_slopes": "*fp32"},
    "bias": {"BIAS": 1, "bias": "*fp32"},
    "bool bias": {"BIAS": 2, "bias": "*u8"},
    "not causal": {"CAUSAL": False},
    "slot scales": {"K_SCALE": 3, "V_SCALE": 3, "k_scale": "*fp32", "v_scale": "*fp32"},
    "channel scales": {"K_SCALE": 4, "V_SCALE": 4, "k_scale": "*fp32", "v_scale": "*fp32"},
    "block 1": {"BLOCK_SIZE": 1},
    "block 3": {"BLOCK_SIZE": 3},
    "block 128": {"BLOCK_SIZE": 128},
    "group 7": {"GROUP": 7},
    "fixed units": {"FIXED": True, "UNIT": 16},
}
INTS = ("block_table", "seq_lens", "cu_seqlens_q", "cu_seqlens_k", "plan")
SPILLS_ALLOWED = ("fp32",)  # without tensor cores


def attention_constants(phase: str, arch: str, cache: str, dim: int) -> dict[str, Any]:
    """What the launcher fixes at compile time; see kernels/launch/operators.py."""
    group = 4
    choice = choose(phase, arch, dim, {"u8": 1, "fp32": 4}.get(cache, 2))
    dim1, dim2 = split_dim(dim)
    return {
        "HKV": 8, "GROUP": group, "DECODE_ROWS": decode_rows(group),
        "ROWS": decode_rows(group) if phase == "decode" else choice.rows,
        "DIM": dim, "DIM1": dim1, "DIM2": dim2, "V_DIM": dim, "V_DIM1": dim1, "V_DIM2": dim2,
        "BLOCK_SIZE": 16, "TILE": choice.tile, "UNIT": 1, "CAUSAL": True, "HAS_WINDOW": False,
        "HAS_CHUNK": False, "HAS_SOFTCAP": False, "BIAS": 0, "K_SCALE": 0, "V_SCALE": 0,
        "IS_E4M3": cache == "u8", "FIXED": False, "INTERPRETED": False,
        **dict.fromkeys(OPTIONAL),
    }  # fmt: skip


def compile_kernel(
    kernel: Any, target: GPUTarget, given: dict[str, Any], pointers: dict[str, str], **options: int
) -> Any:
    """Compile with `given` constants (a "*type" string is a pointer instead) and pointer types."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = given.get(name, name)
        if name in given and not (isinstance(value, str) and value.startswith("*")):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if name in given:
            signature[name] = value
        elif name in pointers:
            signature[name] = pointers[name]
        elif name in INTS:
            signature[name] = "*i32"
        elif name in ("slot_mapping", "slots", "pairs"):
            signature[name] = "*i64"
        elif name in ("scale", "softcap") and kernel in (decode_kernel, prefill_kernel):
            signature[name] = "fp32"
        elif name in ("lse", "lses", "part_values", "part_lse", "scale"):
            signature[name] = "*fp32"
        else:
            signature[name] = "i32"
        pool_stride = name.startswith(("k_stride", "v_stride", "stride_q"))
        if signature[name].startswith("*") or pool_stride:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any) -> tuple[int, int, int]:
    """(shared bytes, registers, spilled bytes) of a kernel; the last two 0 for AMD."""
    shared = compiled.metadata.shared
    if "cubin" not in compiled.asm:
        return shared, 0, 0
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return shared, int(registers), int(stack)


def compile_attention(
    arch: str, phase: str, q: str, cache: str, dim: int, changes: dict[str, Any]
) -> tuple[int, int, int]:
    kernel = decode_kernel if phase == "decode" else prefill_kernel
    given = attention_constants(phase, arch, cache, dim) | changes
    given = {name: value for name, value in given.items() if name in kernel.arg_names}
    pointers = {name: f"*{cache}" for name in ("k_cache", "v_cache")}
    pointers |= {name: f"*{q}" for name in ("q", "out")}
    choice = choose(phase, arch, dim, {"u8": 1, "fp32": 4}.get(cache, 2))
    compiled = compile_kernel(
        kernel, TARGETS[arch], given, pointers, num_warps=choice.warps, num_stages=choice.stages
    )
    return resources(compiled)


def compile_others(arch: str) -> None:
    """Plan, merge and cache kernels."""
    target = TARGETS[arch]
    sizes = {"HKV": 8, "GROUP": 4, "ROWS": 16, "V_DIM": 128, "DIM": 128, "WIDTH": 128}
    sizes |= {"TILE": 64, "UNIT": 1, "HAS_WINDOW": True, "HAS_CHUNK": True, "BLOCK_SIZE": 16}
    sizes |= {"FIXED": False, "SCALE": 3, "IS_E4M3": True, "sinks": "*fp32"}
    kernels = {
        plan_kernel: {},
        merge_kernel: {"out": "*bf16"},
        merge_states_kernel: {"outs": "*bf16", "out": "*bf16"},
        copy_kernel: {"src": "*bf16", "dst": "*bf16"},
        gather_kernel: {"cache": "*bf16", "dense": "*bf16"},
        write_kernel: {"x": "*bf16", "cache": "*u8"},
        fill_channel_scales_kernel: {"x": "*bf16"},
        slot_mapping_kernel: {},
    }
    for kernel, pointers in kernels.items():
        given = {name: value for name, value in sizes.items() if name in kernel.arg_names}
        shared, registers, spills = resources(compile_kernel(kernel, target, given, pointers))
        print(f"{arch} {kernel.__name__:30} shared {shared:6} registers {registers:3} "
              f"spilled {spills}", flush=True)  # fmt: skip


def main(arch: str, phase: str, selection: str = "all") -> int:
    """Compile one phase, or "others"; returns the exit code."""
    if phase == "others":
        compile_others(arch)
        return 0
    spilling = []
    cases: list[tuple[str, str, int, str, dict[str, Any]]] = [(*shape, "", {}) for shape in SHAPES]
    kernel = decode_kernel if phase == "decode" else prefill_kernel
    for name, changes in FEATURES.items():
        if selection == "all" and all(key in kernel.arg_names for key in changes):
            cache = "u8" if "scales" in name else "bf16"
            cases.append(("bf16", cache, 64, name, changes))
    for q, cache, dim, feature, changes in cases:
        shared, registers, spills = compile_attention(arch, phase, q, cache, dim, changes)
        line = f"{arch} {phase} {q}/{cache} {dim} {feature}"
        print(f"{line:44} shared {shared:6} registers {registers:3} spilled {spills}", flush=True)
        if spills and dim in (64, 128) and not feature and q not in SPILLS_ALLOWED:
            spilling.append(line)
    if spilling:
        print("these kernels spill:", *spilling, sep="\n  ")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
