"""Pictures: maps of blocks over time show the shares, and titles fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pykvcache.bench.replay import blockmap, paper, plots
from pykvcache.bench.replay.cases import CONTIGUOUS, Case
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.plan import Budget, Plan
from pykvcache.bench.replay.totals import SHARES
from pykvcache.bench.replay.workload import Workload


def test_pictures(run_small, tmp_path: Path) -> None:
    picture = tmp_path / "replay.png"
    code, out, _ = run_small("--tokens", "20000", "--plot", str(picture))
    assert code == 0 and f"plot: {picture}" in out.replace("\n", "")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1200


def test_padded_alone_has_no_map(run_small, tmp_path: Path) -> None:
    picture = tmp_path / "padded.png"
    assert run_small("--policy", "padded", "--plot", str(picture))[0] == 0
    assert picture.exists()


@pytest.mark.parametrize("case", [*map(Case, CONTIGUOUS), Case("paged", 16)])
def test_maps_show_the_shares(case: Case) -> None:
    workload = Workload("sharegpt-like", max_len=2048, limit=1500)
    plan = Plan.of(workload, Budget(15_728), paper.Rules(), [case.policy], [16])
    drawn = blockmap.draw_map(plan, case, 60.0, 15_728)
    shares = next(plan.run()).shares()
    for kind, name in enumerate(SHARES):
        assert 100 * np.mean(drawn.cells == kind) == pytest.approx(shares[name], abs=8), name


def test_map_of_the_engine_shows_its_scheduler() -> None:
    """Two rows at most: the common loop would fill the memory."""
    rules = paper.Rules(scheduler="engine", max_running=2)
    workload = Workload("sharegpt-like", max_len=2048, limit=60)
    plan = Plan.of(workload, Budget(15_728), rules, ["paged"], [16])
    result = next(plan.run())
    drawn = blockmap.draw_map(plan, plan.cases[0], result.seconds.total, 15_728)
    for kind, name in enumerate(SHARES):
        share = result.shares()[name]
        assert 100 * np.mean(drawn.cells == kind) == pytest.approx(share, abs=1.5), name


def test_columns_of_a_map_are_moments(tmp_path: Path) -> None:
    """One request at a time, 5 s each: a prompt of 10 tokens and 4 more, one a second."""
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n" + "10,5\n" * 1000)
    rules = paper.Rules(StepCost(1.0, 0.0, 0.0))
    plan = Plan.of(Workload(str(path), max_len=16), Budget(16), rules, ["max"])
    drawn = blockmap.draw_map(plan, plan.cases[0], 2640.0, 16)  # 11 s a column
    moments = (np.arange(blockmap.COLUMNS) + 0.5) * 11
    slots = np.arange(blockmap.LINES) * 16 // blockmap.LINES
    length = 10 + np.floor(moments % 5).astype(int)
    expected = np.select(
        [slots[:, None] < length, slots[:, None] < 14], [blockmap.LIVE, blockmap.RESERVED],
        blockmap.INTERNAL,
    )  # fmt: skip
    assert np.array_equal(drawn.cells, expected)


def test_maps_share_time_and_slots_and_leave_out_what_is_never_used(tmp_path: Path) -> None:
    workload = Workload("sharegpt-like", limit=60)
    plan = Plan.of(workload, Budget(10**7), paper.Rules(), ["max", "oracle", "paged"], [16])
    results = list(plan.run())
    seconds = plots.seconds_of(plan, results)
    assert seconds == max(result.seconds.total for result in results)
    maps = blockmap.draw_maps(plan, plan.cases, seconds)
    assert len({(drawn.seconds, drawn.slots) for drawn in maps}) == 1
    assert max(drawn.used for drawn in maps) > blockmap.LINES // 2


def test_a_map_of_few_slots_is_full(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("input_length,output_length\n3,4\n2,5\n4,4\n")
    plan = Plan.of(Workload(str(path)), Budget(65_536), paper.Rules(), ["max", "paged"], [1])
    maps = blockmap.draw_maps(plan, plan.cases, plots.seconds_of(plan, list(plan.run())))
    assert maps[0].slots < 40 and maps[0].unit == 1
    assert max(drawn.used for drawn in maps) > blockmap.LINES // 2


def test_long_names_leave_room_for_the_rest_of_the_title(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200 + ".csv")
    path.write_text("input_length,output_length\n10,5\n")
    title = plots.title_of(Plan.of(Workload(str(path)), Budget(100), paper.Rules()))
    assert len(title) < 140 and title.endswith(".csv, 1 request, 100 token slots, max-len 15")


def test_a_map_with_arrivals_shows_all_of_the_time(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "arrival,input_length,output_length\n" + "".join(f"{60 * i},3,2\n" for i in range(50))
    )
    rules = paper.Rules(StepCost(1.0, 0.0, 0.0), saturated=False)
    plan = Plan.of(Workload(str(path)), Budget(16), rules, ["max"])
    (result,) = plan.run()
    assert result.seconds.total > 49 * 60
    assert plots.seconds_of(plan, [result]) == result.seconds.total
