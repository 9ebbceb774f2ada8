"""Plots of kernels: rooflines, contexts and block sizes."""

from __future__ import annotations

from pathlib import Path

from pykvcache.bench import plots


def test_plots_need_no_more_than_one_kind(tmp_path: Path) -> None:
    row = {"phase": "prefill", "heads": "gqa", "dtype": "bf16", "batch": 1, "length": 64}
    row |= {"threads": 1, "contender": "paged 16", "intensity": 100.0, "gflop_per_second": 50.0}
    row |= {"gb_per_second": 1.0, "peak": 1e11}
    assert [path.name for path in plots.plot_kernels([row], tmp_path)] == ["roofline.png"]


def kernel_row(contender: str, batch: int, length: int) -> dict:
    row = {"phase": "decode", "heads": "gqa", "dtype": "bf16", "batch": batch, "length": length}
    row |= {"threads": 1, "contender": contender, "intensity": 2.0, "gflop_per_second": 50.0}
    return row | {"gb_per_second": 9.0 + batch, "peak": 2e10, "device": "cpu"}


def test_no_two_contenders_look_the_same() -> None:
    names = ["sdpa", "folded", "flex", *(f"paged {2**i}" for i in range(9))]
    names += [f"paged {2**i} triton" for i in range(9)]
    looks = plots.looks_of([kernel_row(name, 1, 64) for name in names])
    assert len({(look.colour, look.face, look.rim) for look in looks.values()}) == len(names)
    assert len({(look.colour, look.line) for look in looks.values()}) == len(names)


def test_labels_of_the_roofline_stay_inside() -> None:
    prefill = kernel_row("paged 16", 1, 64) | {"phase": "prefill", "intensity": 4000.0}
    rows = [kernel_row("paged 16", 1, 64), prefill | {"peak": 1e11}]
    figure = plots.draw_roofline(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    boxes = [label.get_window_extent() for label in axes.texts]
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])
    for box in boxes:
        assert inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0


def test_contexts_are_an_axis() -> None:
    """A panel a batch; batches of one context have none."""
    sizes = ((1, 1024), (1, 4096), (8, 1024), (8, 4096), (32, 4096))
    figure = plots.draw_contexts([kernel_row("paged 16", *size) for size in sizes])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "gqa bf16, 1 row", "gqa bf16, 8 rows"
    ]  # fmt: skip
    for axes in figure.axes:
        assert axes.lines[0].get_xdata().tolist() == [1024, 4096] and axes.get_xscale() == "log"
    assert "context" in figure.get_supxlabel()
    assert plots.draw_contexts([kernel_row("paged 16", b, 4096) for b in (1, 8)]) is None


def test_waste_by_formula_is_drawn_where_it_holds() -> None:
    rows = [kernel_row(f"paged {size}", 1, 64) for size in (16, 64, 128, 256)]
    waste = plots.draw_block_sizes(rows).axes[1]
    assert "formula" in waste.get_title(loc="left") and "formula" in waste.get_ylabel()
    assert waste.lines[0].get_label() == "100 tokens a row"
    assert waste.lines[0].get_xdata().tolist() == [16, 64]


def test_only_the_first_backend_and_even_shares_are_drawn_by_block_size(tmp_path: Path) -> None:
    names = ("paged 16", "paged 64", "paged 16 triton", "paged 64 equal splits")
    rows = [kernel_row(name, 1, 64) for name in names]
    rows[2]["gb_per_second"] = rows[3]["gb_per_second"] = 1.0
    speed = plots.draw_block_sizes(rows).axes[0]
    assert speed.lines[0].get_ydata().tolist() == [100, 100]
    mixed = [row | {"length": 99, "mixed": "1x99+1x9"} for row in rows]
    assert plots.draw_contexts([*rows, *mixed]) is None
    plan = kernel_row("plan", 1, 64) | {"gb_per_second": 0.0, "gflop_per_second": 0.0}
    drawn = plots.plot_kernels([*rows, *mixed, plan], tmp_path)
    assert [path.stem for path in drawn] == ["roofline", "decode-by-block-size"]
