"""The PTX machine: what instructions do, and that every check of memory and barriers fires."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx_machine.conversions import E4M3, to_e4m3
from ptx_machine.fault import Fault
from ptx_machine.machine import Machine
from ptx_machine.parse import parse
from ptx_machine.wgmma import places
from torch import Tensor

HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %d<9>;
    .shared .align 16 .b8 room[4096];
    ld.param.u64 %d1, [k_param_0];
    ld.param.u64 %d2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %d3, %r1, 4, %d1;
    mad.wide.u32 %d4, %r1, 4, %d2;
    mov.u32 %r2, room;
    shl.b32 %r3, %r1, 2;
    add.s32 %r3, %r3, %r2;
"""
LOAD = "ld.global.u32 %r10, [%d3];\n"
STORE = "st.global.u32 [%d4], %r11;\n"


def run(body: str, *tensors: Tensor, threads: int = 64, grid: tuple[int, ...] = (1,)) -> None:
    machine = Machine(parse(HEAD + body + "\nret;\n}"), threads)
    memory = machine.new_memory()
    given = [*tensors, *(torch.zeros(threads).int() for _ in range(2 - len(tensors)))]
    addresses = [memory.register(x, f"x{i}") for i, x in enumerate(given)]
    machine.launch(grid, addresses, None)


def mapped(body: str, x: Tensor, threads: int = 64) -> Tensor:
    """%r10 of each thread -> %r11."""
    out = torch.empty_like(x)
    run(LOAD + body + STORE, x, out, threads=threads)
    return out


INTS = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 12345, -98765, 0x0BADF00D] * 8).int()
FLOATS = torch.tensor([1.5, -2.25, float("nan"), float("inf"), 1e-40, 0.0, 3e38, -1.0] * 8)
INTEGER_CASES = {
    "bfe.s32 %r11, %r10, 8, 8;": lambda x: (x >> 8 & 255) - ((x >> 8 & 128) << 1),
    "bfe.u32 %r11, %r10, 28, 8;": lambda x: (x & 0xFFFFFFFF) >> 28,
    "prmt.b32 %r11, %r10, 0, 0x4012;": lambda x: (x >> 16 & 255) | (x & 0xFF00) | (x & 255) << 16,
    "prmt.b32 %r11, %r10, 0, 0xBBBB;": lambda x: -1 if x >> 31 & 1 else 0,
    "mul.hi.s32 %r11, %r10, 0x12345678;": lambda x: x * 0x12345678 >> 32,
    "mul.hi.u32 %r11, %r10, -5;": lambda x: (x & 0xFFFFFFFF) * (2**32 - 5) >> 32,
    "shr.s32 %r11, %r10, 40;": lambda x: x >> 31,
    "shr.u32 %r11, %r10, 40;": lambda x: 0,
    "shl.b32 %r11, %r10, 33;": lambda x: 0,
    "div.s32 %r11, %r10, -7;": lambda x: -(abs(x) // 7) if x > 0 else abs(x) // 7,
    "rem.s32 %r11, %r10, 7;": lambda x: abs(x) % 7 * (1 if x > 0 else -1),
    "popc.b32 %r11, %r10;": lambda x: (x & 0xFFFFFFFF).bit_count(),
    "clz.b32 %r11, %r10;": lambda x: 32 - (x & 0xFFFFFFFF).bit_length(),
    "shf.r.wrap.b32 %r11, %r10, %r10, 6;": lambda x: (x & 0xFFFFFFFF) >> 6 | (x & 63) << 26,
    "lop3.b32 %r11, %r10, 0x0F0F0F0F, 0x33333333, 0x96;": lambda x: x ^ 0x0F0F0F0F ^ 0x33333333,
    "setp.lo.u32 %p1, %r10, 5; selp.b32 %r11, 1, 2, %p1;": lambda x: 1 if 0 <= x < 5 else 2,
    "setp.gt.and.s32 %p1|%p2, %r10, 5, 1; selp.b32 %r11, 1, 2, %p2;": lambda x: 1 if x <= 5 else 2,
    "cvt.u16.u32 %h1, %r10; cvt.s32.s16 %r11, %h1;": lambda x: (x & 0x7FFF) - (x & 0x8000),
    "{ .reg .b32 %r11x; add.s32 %r11x, %r10, 1; mov.b32 %r11, %r11x; }": lambda x: x + 1,
    "add.s16x2 %r11, %r10, 0x00018001;": lambda x: (
        (x + 0x8001) & 0xFFFF | ((x >> 16) + 1 & 0xFFFF) << 16
    ),
    "mad.lo.s32 %r11, %r10, %r10, 3;": lambda x: x * x + 3,
}


@pytest.mark.parametrize("body", INTEGER_CASES)
def test_integers(body: str) -> None:
    exact = [INTEGER_CASES[body](int(x)) for x in INTS]
    expected = np.array([x & 0xFFFFFFFF for x in exact], np.uint32).view(np.int32)
    np.testing.assert_array_equal(mapped(body, INTS).numpy(), expected)


def test_min_and_max_leave_nan_out() -> None:
    out = mapped("mov.b32 %f1, %r10; max.f32 %f1, %f1, 0f3F800000; mov.b32 %r11, %f1;", FLOATS)
    assert out[:8].tolist() == [1.5, 1.0, 1.0, float("inf"), 1.0, 1.0, torch.tensor(3e38), 1.0]
    out = mapped("mov.b32 %f1, %r10; max.NaN.f32 %f1, %f1, 0f3F800000; mov.b32 %r11, %f1;", FLOATS)
    assert out[2].isnan() and out[0] == 1.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("eq", 0), ("ne", 0), ("equ", 1), ("neu", 1), ("lt", 0), ("geu", 1), ("nan", 1), ("num", 0)],
)
def test_comparisons_with_nan(name: str, expected: int) -> None:
    body = f"mov.b32 %f1, %r10; setp.{name}.f32 %p1, %f1, 0f00000000; selp.b32 %r11, 1, 0, %p1;"
    assert mapped(body, FLOATS).view(torch.int32)[2] == expected


def test_ftz_flushes_what_comes_in() -> None:
    times = "mov.b32 %f1, %r10; mul{}.f32 %f1, %f1, 0f7E800000; mov.b32 %r11, %f1;"
    assert mapped(times.format(".ftz"), FLOATS)[4] == 0
    assert mapped(times.format(""), FLOATS)[4] != 0


def test_pairs_have_the_first_number_above() -> None:
    x = torch.randn(64)
    body = "mov.b32 %f1, %r10; cvt.rn.bf16x2.f32 %r11, %f1, 0f3F800000;"
    pairs = mapped(body, x).view(torch.bfloat16).view(64, 2)
    assert torch.equal(pairs[:, 1], x.bfloat16()) and (pairs[:, 0] == 1).all()


def test_float8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, codes)
    x = torch.cat([torch.randn(5000) * 100, torch.randn(5000) * 1e-3, torch.tensor([448.0, 464])])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(to_e4m3(x.numpy()), expected.numpy())


def test_shuffles() -> None:
    x = torch.arange(64).int()
    lanes = mapped("shfl.sync.bfly.b32 %r11, %r10, 5, 31, -1;", x)
    assert lanes.tolist() == [i ^ 5 for i in range(64)]
    lanes = mapped("shfl.sync.up.b32 %r11, %r10, 3, 0, -1;", x)
    assert lanes.tolist() == [i - 3 if i % 32 >= 3 else i for i in range(64)]
    lanes = mapped("shfl.sync.down.b32 %r11, %r10, 1, 0x1807, -1;", x)  # segments of 8
    assert lanes.tolist() == [i + 1 if i % 8 < 7 else i for i in range(64)]
    sums = mapped("redux.sync.add.s32 %r11, %r10, -1;", x)
    assert sums.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_matrices_are_read_transposed() -> None:
    """Lane t has elements 2 t and 2 t + 1 of the 8 x 8 matrix, or of its transpose."""
    x = torch.arange(64, dtype=torch.int16).view(torch.int32)  # 8 rows of 8
    for trans in ("", ".trans"):
        body = f"""st.shared.b32 [%r3], %r10; shl.b32 %r4, %r1, 4; add.s32 %r4, %r4, %r2;
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r11}}, [%r4];"""
        matrix = torch.arange(64).view(8, 8)
        expected = (matrix.T if trans else matrix).flatten().short()
        assert torch.equal(mapped(body, x, threads=32).view(torch.int16), expected)


def test_threads_that_part_meet_again() -> None:
    body = """and.b32 %r12, %r1, 3; mov.b32 %r11, 0; setp.eq.s32 %p1, %r12, 0; @%p1 bra $done;
    $again: add.s32 %r11, %r11, %r10; sub.s32 %r12, %r12, 1; setp.gt.s32 %p1, %r12, 0;
    @%p1 bra $again;
    $done: shfl.sync.idx.b32 %r11, %r11, 3, 31, -1;"""
    out = mapped(body, torch.arange(64).int())
    assert out.tolist() == [9] * 32 + [105] * 32


def test_a_product_of_tensor_cores() -> None:
    """m16n8k8 of tf32: lane 4 g + t holds A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]."""
    a, b = torch.randint(-8, 8, (16, 8)).float(), torch.randint(-8, 8, (8, 8)).float()
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    parts = [a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g]]
    x, out = torch.stack(parts, 1).contiguous(), torch.empty(32, 4)
    body = """mad.wide.u32 %d5, %r1, 24, %d1; mad.wide.u32 %d6, %r1, 16, %d2;
    ld.global.v2.u32 {%r4, %r5}, [%d5]; ld.global.v2.u32 {%r6, %r7}, [%d5+8];
    ld.global.v2.u32 {%r8, %r9}, [%d5+16]; mov.f32 %f1, 0f3F800000;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f2, %f3, %f4, %f5},
      {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%f1, %f1, %f1, %f1};
    st.global.v4.f32 [%d6], {%f2, %f3, %f4, %f5};"""
    run(body, x, out, threads=32)
    c = a @ b + 1
    expected = torch.stack([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]], 1)
    assert torch.equal(out, expected)


def test_a_swizzled_descriptor() -> None:
    """128 bytes: rows lie 128 bytes apart, 16-byte pieces of row r at (piece ^ r % 8)."""
    descriptor = 1 << 62 | (1024 >> 4) << 32 | 2048 >> 4
    at = places(descriptor, 64, 16, False, 2)
    for row, k in ((0, 0), (1, 0), (5, 9), (13, 15)):
        piece = (k // 8) ^ row % 8
        assert at[row, k] == 2048 + row // 8 * 1024 + row % 8 * 128 + piece * 16 + k % 8 * 2


def test_atomics_count_every_thread() -> None:
    out = torch.zeros(1).int()
    run("red.global.add.u32 [%d2], 1;", torch.zeros(64).int(), out, grid=(3,))
    assert out.item() == 192


ASYNC = """mad.wide.u32 %d5, %r1, 12, %d3; shl.b32 %r4, %r1, 4; add.s32 %r4, %r4, %r2;
cp.async.cg.shared.global [%r4], [%d5], 16, {bytes}; cp.async.commit_group;"""


@pytest.mark.parametrize("threads", [32, 64])
def test_copies_arrive_when_they_are_waited_for(threads: int) -> None:
    x, out = torch.arange(4 * threads).int(), torch.empty(threads).int()
    body = ASYNC.format(bytes=8) + """cp.async.wait_group 0; bar.sync 0;
    xor.b32 %r5, %r4, 16; ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];
    add.s32 %r11, %r7, %r9;""" + STORE  # fmt: skip
    run(body, x, out, threads=threads)
    assert out.tolist() == [4 * (i ^ 1) + 1 for i in range(threads)]  # the last 8 bytes are 0


WRITE, ACROSS = "st.shared.u32 [%r3], %r1;", "xor.b32 %r5, %r3, 128;"  # ACROSS: of the other warp
READ_ACROSS = ACROSS + "ld.shared.u32 %r4, [%r5];"
HALF = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $end; {} $end:"
ODD = "and.b32 %r4, %r1, 1; setp.eq.s32 %p1, %r4, 0; @%p1 bra $end; {} $end:"
# (what runs, the tensor x0, what the error says)
WORDS, MANY_WORDS = torch.zeros(64).int(), torch.zeros(512).int()
GAPS = torch.zeros(64, 3).int()[:, :2]  # every third word is not part of it
FAULTS = {
    "past the end": ("ld.global.u32 %r9, [%d3+4];", WORDS, "outside: thread 63, 4 bytes"),
    "before": ("st.global.u32 [%d4+-4], %r1;", WORDS, "outside: thread 0, .* 4 bytes before x1"),
    "null": ("mov.u64 %d5, 0; ld.global.u32 %r9, [%d5];", WORDS, "outside: thread 0"),
    "gap": (LOAD, GAPS, r"outside: thread 2, 4 bytes .* of x0 \[64, 2\] of int32"),
    "alignment": (
        "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d3];", WORDS, "misaligned: thread 1, 16 bytes"
    ),
    "shared alignment": (
        "ld.shared.v2.u32 {%r4, %r5}, [%r3+4];", WORDS, "misaligned: thread 0, 8 bytes at 4 "
    ),
    "shared end": ("st.shared.u32 [%r3+4096], %r1;", WORDS, "outside: .* 4096 of 4096 bytes"),
    "unwritten": ("ld.shared.u32 %r4, [%r3];", WORDS, "reads what nobody wrote: thread 0"),
    "write read": (WRITE + READ_ACROSS, WORDS, "race: reads .* thread 0, byte 128 .* thread 32"),
    "write write": (WRITE + ACROSS + "st.shared.u32 [%r5], %r1;", WORDS, "race: writes .* wrote"),
    "read write": (
        WRITE + "bar.sync 0;" + READ_ACROSS + "st.shared.u32 [%r3], %r4;", WORDS,
        "race: writes what another thread reads",
    ),
    "one store": ("st.shared.u32 [%r2], %r1;", WORDS, "store different values"),
    "one warp": (
        WRITE + "xor.b32 %r5, %r3, 4; ld.shared.u32 %r4, [%r5];", WORDS,
        "race: reads what another thread wrote: thread 0, byte 4 ",
    ),
    "copy not awaited": (
        ASYNC.format(bytes=16) + "ld.shared.u32 %r5, [%r4];", MANY_WORDS, "cp.async is writing"
    ),
    "copy without barrier": (
        ASYNC.format(bytes=16)
        + "cp.async.wait_group 0; xor.b32 %r5, %r4, 16; ld.shared.u32 %r5, [%r5];",
        MANY_WORDS, "reads what another thread wrote: thread 0, byte 16",
    ),
    "copy of too much": (ASYNC.format(bytes=17), MANY_WORDS, "cp.async of 17 bytes out of 16"),
    "barrier": (HALF.format("bar.sync 0;"), WORDS, "a barrier that 32 threads never reach"),
    "missing lanes": (
        ODD.format("shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"), WORDS, "waits for lanes of its warp"
    ),
    "endless": ("$top: bra $top;", WORDS, "it does not end"),
    "unknown": ("frobnicate.b32 %r1, %r2;", WORDS, "line 17: frobnicate.b32 %r1, %r2: .*not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    body, x, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        run(body, x)


def test_a_warp_may_order_itself() -> None:
    body = "st.shared.u32 [%r3], %r10; bar.warp.sync -1; xor.b32 %r5, %r3, 4;"
    out = mapped(body + "ld.shared.u32 %r11, [%r5];", torch.arange(64).int())
    assert out.tolist() == [i ^ 1 for i in range(64)]


def test_equal_values_may_be_written_by_many() -> None:
    out = mapped("st.shared.u32 [%r2], 7; bar.sync 0; ld.shared.u32 %r11, [%r2];", INTS)
    assert out.tolist() == [7] * 64


def test_a_kernel_takes_its_threads_and_arguments() -> None:
    machine = Machine(parse(HEAD + "ret; }"), 32)
    with pytest.raises(Fault, match="takes 2 arguments, got 1"):
        machine.launch((1,), [0], None)
    with pytest.raises(Fault, match="wants 32 threads, got 64"):
        Machine(parse((HEAD + "ret; }").replace("k_param_1)\n", "k_param_1)\n.reqntid 32\n")), 64)
