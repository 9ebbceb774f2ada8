"""Launch tables: what they change, where they are found, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from tune_samples import SPEC, explain, write

from pykvcache import _C, launch_table, operators, ops


def test_a_table_changes_what_is_launched() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before, general = explain(), explain(SPEC + ",q=512")
    entry = {"dim": 128, "bytes": 2}
    launch_table.use_on_cpu(
        {
            "cpu": {
                "decode": [entry | {"tile": 64, "stages": 1, "splits": 8}],
                "prefill": [entry | {"rows": 128}],
            }
        }
    )
    after = explain()
    assert (before["tile"], before["stages"]) == (16, 3)
    assert (after["tile"], after["stages"]) == (64, 1)
    assert after["items"] > before["items"]
    assert (general["query_tile"], explain(SPEC + ",q=512")["query_tile"]) == (128, 32)
    assert explain(SPEC.replace("bf16", "fp32"))["tile"] == 16  # another element size
    assert explain(SPEC.replace("D=128", "D=64"))["tile"] == 32
    streamed = explain(SPEC.replace("HQ=32", "HQ=8").replace("bf16", "fp32"))
    if _C.cpu_isa().startswith("avx512"):  # one query row a KV head: the two streams
        assert (streamed["tile"], streamed["stages"]) == (32, 0)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 576])
def test_every_launch_gives_the_same_result(dtype: torch.dtype, head_dim: int) -> None:
    k_cache, v_cache = torch.randn(2, 40, 2, 16, head_dim).to(dtype)
    table = torch.randperm(40)[:32].view(2, 16).int()
    seq_lens = torch.tensor([201, 37], dtype=torch.int32)
    for counts in ([1, 1], [120, 37]):
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        q = torch.randn(sum(counts), 8, head_dim).to(dtype)
        rest = (table, seq_lens, starts, max(counts))
        expected, _ = ops.paged_attention(
            q.float(), k_cache.float(), v_cache.float(), *rest, backend="reference"
        )
        for choice in ({}, {"tile": 16}, {"tile": 64, "stages": 3}, {"tile": 48, "stages": 1}):
            rows = {"rows": 8 * choice["tile"]} if "tile" in choice else {}
            launch_table.use_on_cpu({"cpu": {"decode": [choice], "prefill": [rows]}})
            out, _ = ops.paged_attention(q, k_cache, v_cache, *rest, backend="cpu")
            error = (out.float() - expected).abs().max()
            assert error <= 16 * torch.finfo(dtype).eps * max(1, expected.abs().max())


def test_first_entry_that_fits_is_taken() -> None:
    entries = [{"max_dim": 64, "tile": 16}, {"dim": 128, "max_bytes": 2, "tile": 32}, {"tile": 64}]
    launch_table.use_on_cpu({"cpu": {"decode": entries}})
    for dim, dtype, tile in (
        (64, "bf16", 16),
        (128, "bf16", 32),
        (128, "fp32", 64),
        (80, "bf16", 64),
    ):
        spec = SPEC.replace("D=128", f"D={dim}").replace("bf16", dtype)
        assert explain(spec)["tile"] == tile
    for entry in entries:
        assert launch_table.fits(entry, 64, 2) == ("dim" not in entry)


def test_user_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"cpu": {"decode": [{"tile": 32}]}}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(launch_table.VARIABLE, raising=False)
    assert launch_table.find_user_table() == ({}, None)
    path = tmp_path / "pykvcache" / "launch.json"
    path.parent.mkdir()
    write(path, section)
    assert launch_table.find_user_table() == (section, path)
    named = write(tmp_path / "mine.json", {})
    monkeypatch.setenv(launch_table.VARIABLE, str(named))
    assert launch_table.find_user_table() == ({}, named)
    monkeypatch.setenv(launch_table.VARIABLE, "none")
    assert launch_table.find_user_table() == ({}, None)
    monkeypatch.setenv(launch_table.VARIABLE, str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match=r"launch table .*nothing.json cannot be read"):
        launch_table.find_user_table()
    monkeypatch.delenv(launch_table.VARIABLE)
    path.write_text("{")
    with pytest.warns(UserWarning, match=r"no launch table is used: .*is no JSON"):
        assert launch_table.user_table() == {}


def test_broken_table_that_was_named(tmp_path: Path) -> None:
    """Nothing is refused, but it is said."""
    command = [sys.executable, "-W", "always", "-m", "pykvcache"]
    environment = os.environ | {launch_table.VARIABLE: str(tmp_path / "nothing.json")}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    found = subprocess.run([*command, "info"], **options)
    assert found.returncode == 0 and "nothing.json cannot be read" in found.stderr


def test_section_of_another_processor_is_not_used() -> None:
    table = {"cpu": {"device": "another", "decode": [{"tile": 64}]}}
    assert not launch_table.use_on_cpu(table)
    assert explain()["tile"] == 16
    assert launch_table.use_on_cpu(table, cpu_name="another")
    assert explain()["tile"] == 64


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "must be a JSON object"),
        ({"cpu": 3}, "section cpu must be an object"),
        ({"cpu": {"decode": [7]}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decode": [{"tiles": 7}]}}, "cpu.decode knows .*, got 'tiles'"),
        ({"cpu": {"decode": [{"tile": 0}]}}, "tile must be one of 16, 32, 48, 64, got 0"),
        ({"cpu": {"decode": [{"tile": 50}]}}, "tile must be one of 16, 32, 48, 64, got 50"),
        ({"cpu": {"decode": [{"stages": 9}]}}, "stages must be an integer from 1 to 3, got 9"),
        ({"cpu": {"prefill": [{"rows": 9999}]}}, "rows must be an integer from 1 to 4096"),
        ({"cpu": {"decode": [{"splits": 10**25}]}}, "splits must be an integer from 1 to 64"),
        ({"cpu": {"decode": [{"dim": True}]}}, "dim must be an integer from 1 to 576, got True"),
        ({"cpu": {"decode": None}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decode": 5}}, "cpu.decode must be a list of objects"),
        ({"cpu": {"decod": []}}, "section cpu knows decode, prefill, device, got 'decod'"),
        ({"cpu": {"device": 5}}, "cpu.device must be a processor's name, got 5"),
        ({"cpus": {}}, "sections are cpu, sm_N, gfxN and interpreter, got 'cpus'"),
        ({"sm_90": {"programs_per_sm": 0}}, "programs_per_sm must be an integer from 1 to 64"),
        ({"sm_90": {"decode": [{"tile": 48, "stages": 1, "warps": 4}]}}, "tile must be one of"),
        ({"sm_90": {"decode": [{"tile": 16}]}}, "sm_90.decode needs stages, warps"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        launch_table.read_table(write(tmp_path / "launch.json", table))
    assert "launch.json" in str(caught.value) and "\n" not in str(caught.value)


def test_launches_out_of_range_change_nothing() -> None:
    launch_table.use_on_cpu({"cpu": {"decode": [{"tile": 32}]}})
    with pytest.raises(ValueError, match="stages must be 0 to 3, got 9"):
        launch_table.use_on_cpu({"cpu": {"decode": [{"stages": 9}]}})
    with pytest.raises(ValueError, match="an entry is 9 integers"):
        _C.set_launches(array("q", [0] * 8).tobytes())
    assert explain()["tile"] == 32


@pytest.mark.parametrize(
    "text", ['{"cpu": {"decode": 5}}', '{"cpu": {"decode": [{"tile": 1}]}}', "["]
)
def test_broken_table_is_a_warning(tmp_path: Path, monkeypatch, text: str) -> None:
    path = tmp_path / "launch.json"
    path.write_text(text)
    monkeypatch.setenv(launch_table.VARIABLE, str(path))
    with pytest.warns(UserWarning, match=r"no launch table is used: .*launch.json"):
        assert operators.LOADERS["cpu"]() == "ready"
    monkeypatch.setattr(launch_table, "check_table", lambda table: None)  # and one that C++ refuses
    path.write_text('{"cpu": {"decode": [{"stages": 9}]}}')
    with pytest.warns(UserWarning, match="stages must be 0 to 3, got 9"):
        assert operators.LOADERS["cpu"]() == "ready"


CALLS = {"decode": {"dim": 128, "bytes": 2}, "prefill": {"dim": 128, "bytes": 2}}


def test_merging_replaces_what_was_measured_and_keeps_other_models() -> None:
    mine = {"dim": 128, "bytes": 2}
    old = {"cpu": {"device": "x", "decode": [{"dim": 64, "tile": 16}, mine | {"tile": 16}]}}
    new = {"device": "x", "decode": [mine | {"tile": 64}]}
    merged = launch_table.merge_section(old, "cpu", new, CALLS)
    assert merged["cpu"]["decode"] == [mine | {"tile": 64}, {"dim": 64, "tile": 16}]
    assert launch_table.merge_section({}, "cpu", new, CALLS) == {"cpu": new}
    # the kernels' own choice was best: nothing that says otherwise stays in force
    merged = launch_table.merge_section(old, "cpu", {"device": "x"}, CALLS)
    assert merged["cpu"]["decode"] == [{"dim": 64, "tile": 16}]
    rows = {"device": "x", "prefill": [mine | {"rows": 256}]}
    merged = launch_table.merge_section(old, "cpu", rows, CALLS)
    assert merged["cpu"]["decode"] == [{"dim": 64, "tile": 16}]
    wide = {"cpu": {"device": "x", "decode": [{"max_dim": 256, "tile": 16}]}}
    merged = launch_table.merge_section(wide, "cpu", {"device": "x"}, CALLS)
    assert merged["cpu"]["decode"] == [mine, {"max_dim": 256, "tile": 16}]
    launch_table.check_table(merged)
    launch_table.use_on_cpu(merged, "x")
    assert explain()["tile"] == 16 and explain(SPEC.replace("bf16", "fp32"))["tile"] == 16
    only = {"cpu": {"device": "x", "decode": [mine | {"tile": 16}]}, "about": {}}
    assert launch_table.merge_section(only, "cpu", {"device": "x"}, CALLS) == {"about": {}}


def test_merging_never_relabels_entries_of_another_processor() -> None:
    old = {"cpu": {"device": "x", "decode": [{"dim": 64, "tile": 16}]}}
    new = {"device": "y", "decode": [{"dim": 128, "bytes": 2, "tile": 64}]}
    assert launch_table.merge_section(old, "cpu", new, CALLS) == {"cpu": new}
    assert launch_table.merge_section(old, "cpu", {"device": "y"}, CALLS) == old


def test_merging_a_section_of_a_gpu() -> None:
    entry = {"dim": 128, "tile": 32, "stages": 4, "warps": 8}
    prefill = entry | {"rows": 64}
    old = {"sm_90": {"decode": [entry], "prefill": [prefill], "programs_per_sm": 4}}
    calls = {"decode": {"dim": 128}}
    assert launch_table.merge_section(old, "sm_90", {}, calls) == {"sm_90": {"prefill": [prefill]}}


def test_triton_reads_the_same_table() -> None:
    pytest.importorskip("triton")
    from pykvcache.kernels.launch import table

    packaged = table.choose("decode", "sm_90", 128, 2)
    user = {"sm_90": {"decode": [{"dim": 128, "tile": 32, "stages": 4, "warps": 8}]}}
    try:
        table.use(user)
        assert table.choose("decode", "sm_90", 128, 2) == table.Choice(32, 8, 4)
        assert table.decode_tile("sm_90", 128) == 32
        assert table.choose("decode", "sm_80", 128, 2) == packaged
        assert table.choose("prefill", "sm_90", 128, 2).rows == 128
        own = {"sm_90": {"decode": [{"dim": 128}, user["sm_90"]["decode"][0]]}}
        table.use(own)  # an entry without parameters: the package's choice
        assert table.choose("decode", "sm_90", 128, 2) == packaged
    finally:
        table.use({})
    assert table.choose("decode", "sm_90", 128, 2) == packaged
