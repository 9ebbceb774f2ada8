"""Files to write: bad ones are found before the work, and a failure harms none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pykvcache.bench.replay import plan as plan_module


def test_files_are_found_bad_before_the_work_and_stay_as_they_are(
    run, run_small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan_module, "run_case", None)
    for option, file in (
        ("--json", "/proc/x.json"),
        ("--json", ""),
        ("--json", str(tmp_path / ("n" * 300))),
        ("--plot", "/proc/x.png"),
    ):
        code, out, err = run_small(option, file)
        assert (code, out) == (2, "") and err.count("\n") == 1 and option in err
    trace, link, same = (tmp_path / name for name in ("a.csv", "link.json", "same.png"))
    trace.write_text("input_length,output_length\n10,5\n")
    link.symlink_to(trace)
    for option, file in (("--json", trace), ("--json", link)):
        code, out, err = run("--trace", str(trace), option, str(file))
        assert (code, out) == (2, "") and "--json and --trace are the same file" in err
    code, _, err = run_small("--json", str(same), "--plot", str(same))
    assert code == 2 and "--json and --plot are the same file" in err
    assert trace.read_text().startswith("input_length") and not same.exists()
    link.unlink()
    link.symlink_to(tmp_path / "target.json")
    run_small("--json", str(link), "--tokens", "0")
    assert link.is_symlink() and not link.exists()
    link.unlink()
    trace.unlink()
    old = tmp_path / "old.json"
    old.write_text("old")
    run_small("--json", str(old), "--plot", str(tmp_path / "new.png"), "--tokens", "0")
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_json_follows_a_link_that_leads_nowhere_yet(run_small, tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    assert run_small("--policy", "max", "--json", str(link))[0] == 0
    assert link.is_symlink() and len(json.loads(target.read_text())) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_the_table_is_shown(run_small) -> None:
    code, out, err = run_small("--policy", "max", "--json", "/dev/full")
    assert code == 1 and "max-length" in out
    assert err.startswith("pykvcache: ") and err.count("\n") == 1 and "--json" in err


def test_names_are_shown_and_drawn_as_they_are(run, tmp_path: Path) -> None:
    """Brackets are no markup, colons no emoji, and dollars no formula."""
    folder = tmp_path / "weird[bold]"
    folder.mkdir()
    trace, picture = folder / "a$x_{$:smile:[b].csv", folder / "p[italic].png"
    trace.write_text("input_length,output_length\n10,5\n20,9\n")
    options = ("--tokens", "100", "--policy", "max", "--plot", str(picture))
    code, out, err = run("--trace", str(trace), *options)
    assert code == 0, err
    assert picture.exists() and picture.name in out and trace.name in out
