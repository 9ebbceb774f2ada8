"""What the PTX machine counts: sectors, bank conflicts, instructions, bytes in flight, hot loops.

Each kernel here is made so that its figure is known.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx_machine import cost, sass
from ptx_machine.counts import Counts, class_of, counted, total
from ptx_machine.machine import Machine
from ptx_machine.parse import parse

HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 k_param_0)
{
    .reg .pred %p<4>; .reg .b32 %r<20>; .reg .b64 %d<9>;
    .shared .align 128 .b8 room[8192];
    ld.param.u64 %d1, [k_param_0];
    mov.u32 %r1, %tid.x;
    and.b32 %r2, %r1, 31;
    mov.u32 %r3, room;
"""
WARPS = 2


def count(body: str) -> Counts:
    """Of a CTA of two warps that has 64 KiB of global memory at %d1."""
    machine = Machine(parse(HEAD + body + "\nret;\n}"), 32 * WARPS)
    counts = counted(machine)
    memory = machine.new_memory()
    x = torch.zeros(16384, dtype=torch.int32)
    machine.launch((1,), [memory.register(x, "x")], None)
    return counts


# Instruction -> sectors that a warp touches, the fewest for its bytes, bytes of a thread.
LOADS = {
    "mad.wide.u32 %d2, %r1, 4, %d1; ld.global.u32 %r5, [%d2];": (4, 4, 4),
    "mad.wide.u32 %d2, %r1, 32, %d1; ld.global.u32 %r5, [%d2];": (32, 4, 4),
    "mad.wide.u32 %d2, %r1, 8, %d1; ld.global.u32 %r5, [%d2];": (8, 4, 4),
    "ld.global.u32 %r5, [%d1];": (1, 1, 4),
    "mad.wide.u32 %d2, %r1, 16, %d1; ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d2];": (16, 16, 16),
    "mad.wide.u32 %d2, %r1, 2, %d1; ld.global.u16 %r5, [%d2];": (2, 2, 2),
    # The address is overwritten.
    "mad.wide.u32 %d2, %r1, 64, %d1; ld.global.u64 %d2, [%d2];": (32, 8, 8),
    # Eight lanes of each warp.
    "mad.wide.u32 %d2, %r1, 32, %d1; setp.lt.u32 %p1, %r2, 8;"
    "@%p1 ld.global.u32 %r5, [%d2];": (8, 1, 4),
    "mad.wide.u32 %d2, %r1, 16, %d1; shl.b32 %r4, %r1, 4; add.u32 %r4, %r4, %r3;"
    "cp.async.cg.shared.global [%r4], [%d2], 16; cp.async.wait_all;": (16, 16, 16),
    # Odd lanes copy nothing.
    "mad.wide.u32 %d2, %r1, 32, %d1; shl.b32 %r4, %r1, 4; add.u32 %r4, %r4, %r3;"
    "and.b32 %r5, %r1, 1; setp.ne.u32 %p1, %r5, 0;"
    "cp.async.cg.shared.global [%r4], [%d2], 16, %p1; cp.async.wait_all;": (16, 8, 16),
}  # fmt: skip


@pytest.mark.parametrize("body", LOADS)
def test_sectors(body: str) -> None:
    (loads,) = count(body).loads.values()
    expected = LOADS[body]
    assert (loads.moved / WARPS, loads.least / WARPS, loads.width) == expected
    assert loads.requests == WARPS


def test_stores_are_apart() -> None:
    counts = count("mad.wide.u32 %d2, %r1, 8, %d1; st.global.u32 [%d2], %r1;")
    assert not counts.loads
    assert (total(counts.stores).moved, total(counts.stores).least) == (16, 8)
    index, traffic = counts.worst(counts.stores) or (0, None)
    assert counts.machine.program.instructions[index].opcode[0] == "st"
    assert traffic is counts.stores[index]


def at(address: str) -> str:
    """%r4 = room + address, of the lane in %r2."""
    return f"{address} add.u32 %r4, %r4, %r3;"


ROW = "shr.u32 %r5, %r2, 3; and.b32 %r6, %r2, 7;"  # matrix and row that a lane names
MATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r4];"
READ = "ld.shared.u32 %r10, [%r4];"
# Instruction -> passes of a warp, the fewest.
SHARED = {
    at("shl.b32 %r4, %r2, 2;") + READ: (1, 1),
    at("shl.b32 %r4, %r2, 4;") + READ: (4, 1),
    at("shl.b32 %r4, %r2, 7;") + READ: (32, 1),
    at("mov.u32 %r4, 64;") + READ: (1, 1),
    # A column of 32 rows of 128 bytes; then with the column exclusive-ored with the row.
    at("shl.b32 %r4, %r2, 7; add.u32 %r4, %r4, 20;") + READ: (32, 1),
    at("xor.b32 %r5, %r2, 5; shl.b32 %r5, %r5, 2; shl.b32 %r4, %r2, 7; add.u32 %r4, %r4, %r5;")
    + READ: (1, 1),
    at("shl.b32 %r4, %r2, 3;") + "ld.shared.v2.u32 {%r10, %r11}, [%r4];": (2, 2),
    at("shl.b32 %r4, %r2, 5;") + "ld.shared.v2.u32 {%r10, %r11}, [%r4];": (8, 2),
    at("shl.b32 %r4, %r2, 4;") + "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];": (4, 4),
    at("shl.b32 %r4, %r2, 5;") + "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];": (8, 4),
    # Four matrices of 8 rows of 16 bytes: chunk m of rows of 128 bytes, then swizzled.
    ROW + at("shl.b32 %r4, %r6, 7; shl.b32 %r5, %r5, 4; add.u32 %r4, %r4, %r5;") + MATRIX: (32, 4),
    ROW + at("xor.b32 %r5, %r5, %r6; shl.b32 %r5, %r5, 4; shl.b32 %r4, %r6, 7;"
             "add.u32 %r4, %r4, %r5;") + MATRIX: (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("body", SHARED)
def test_bank_conflicts(body: str) -> None:
    fill = "shl.b32 %r7, %r1, 2; add.u32 %r7, %r7, %r3;"
    fill += "".join(f"st.shared.u32 [%r7+{i}], %r1;" for i in range(0, 8192, 256)) + "bar.sync 0;"
    counts = count(fill + body)
    last = max(counts.shared)
    traffic = counts.shared.pop(last)
    assert (traffic.moved / WARPS, traffic.least / WARPS) == SHARED[body]
    assert all(each.moved == each.least == WARPS for each in counts.shared.values())


def test_instructions_are_counted_by_warps_that_issue_them() -> None:
    body = """
    setp.lt.u32 %p1, %r1, 40;
    @!%p1 bra $away;
    add.f32 %r5, %r5, %r5;
    $away:
    ex2.approx.f32 %r5, %r5;
    setp.ge.u32 %p1, %r1, 32;
    @%p1 bra $end;
    ex2.approx.f32 %r5, %r5;
    $end:
    """
    classes = count(body).by_class()
    # The first warp stays together, the second parts for the addition and joins for ex2.
    assert classes["float"] == 2 and classes["special"] == 2 + 1
    assert classes["move"] == 3 * WARPS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "matrix"),
        ("cp.async.cg.shared.global", "global"),
        ("cp.async.wait_group", "control"),
        ("st.shared.b32", "shared"),
        ("cvt.rn.bf16x2.f32", "convert"),
        ("shfl.sync.bfly.b32", "warp"),
        ("max.f32", "float"),
        ("mad.lo.s32", "integer"),
    ],
)
def test_classes(text: str, expected: str) -> None:
    program = parse(HEAD + text + " %r1, %r2;\n}")
    assert class_of(program.instructions[-1]) == expected


def test_bytes_in_flight() -> None:
    copy = "cp.async.cg.shared.global [%r4+{0}], [%d2+{0}], 16; cp.async.commit_group;"
    body = "mad.wide.u32 %d2, %r1, 16, %d1; shl.b32 %r4, %r1, 4; add.u32 %r4, %r4, %r3;"
    body += "".join(copy.format(1024 * i) for i in range(3))
    counts = count(body + "cp.async.wait_group 1; cp.async.wait_group 0;")
    assert counts.in_flight == (1024, 3072)


# A made-up disassembly: a loop that multiplies, where one branch skips work and one is never worth
# taking, a loop around it, and a loop that only adds.
LISTING = """
.text.kernel:
.L_x_0:
        /*0000*/  IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0010*/  LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64], P0 ;
        /*0020*/  LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*0030*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/  MUFU.EX2 R5, R5 ;
        /*0050*/  @P1 BRA `(.L_x_2) ;
        /*0060*/  FMUL R4, R4, R6 ;
        /*0070*/  FMUL R5, R5, R6 ;
.L_x_2:
        /*0080*/  @P2 BRA `(.L_x_3) ;
        /*0090*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_3:
        /*00a0*/  F2F.BF16.F16 R5, R5 ;
        /*00b0*/  @!P0 BRA `(.L_x_1) ;
        /*00c0*/  @P3 BRA `(.L_x_0) ;
.L_x_4:
        /*00d0*/  FADD R4, R4, R5 ;
        /*00e0*/  @P4 BRA `(.L_x_4) ;
        /*00f0*/  EXIT ;
"""


def test_hot_pass() -> None:
    (name, text), *rest = sass.functions(LISTING).items()
    assert name == "kernel" and not rest
    hot = sass.hot_pass(text)
    assert hot.issued == 9 and hot.opcodes["FMUL"] == 0
    assert hot.counts["mma"] == 2 and hot.counts["control"] == 3
    assert hot.copied_bytes == 512
    spent = cost.cycles(hot)
    assert (
        spent.issue == 9 / 4 and spent.special == 2 * 32 / 16 and spent.products == 2 * 2048 / 1024
    )
    assert spent.memory == pytest.approx(512 / 14.9, rel=0.01)
    with pytest.raises(ValueError, match="no loop multiplies"):
        sass.hot_pass(text.replace("HMMA", "IMAD"))


def test_resident_ctas() -> None:
    made = cost.Compiled(registers=168, spilled=0, hot=None)
    assert made.resident(128, 36 * 1024) == 3  # by registers: 21504 each
    assert made.resident(128, 96 * 1024) == 2
    assert cost.Compiled(32, 0, None).resident(1024, 0) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_command(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ptx_machine") / "report.py"
    target = tmp_path / "rows.json"
    command = [sys.executable, str(script), "--only", "D64 block 16 G1", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in json.loads(target.read_text()) if row["kernel"] == "decode_kernel"]
    assert [row["call"].split()[1] for row in rows] == ["bf16", "fp8"]
    for row in rows:
        assert row["load_sectors"] > 0.95 and row["ctas"] >= 2
        assert row["pass_bytes"] > 0 and 0.1 < row["issue_share"] < 1.5
    assert rows[0]["bank_passes"] < 1.01 and rows[0]["flight_kib"] >= 32
