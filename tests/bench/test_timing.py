"""Timing: quantiles, and contenders that take turns."""

from __future__ import annotations

import torch

from pykvcache.bench.timing import Timing, interleave, take_turns


def test_timing_quantiles() -> None:
    timing = Timing.of([float(i) for i in range(11)])
    assert (timing.median, timing.p10, timing.p90, timing.samples) == (5, 1, 9, 11)
    assert timing.over(5).median == 1


def test_interleave_gives_every_contender_its_own_running_numbers() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def contender(name: str):
        def run(number: int) -> None:
            seen[name].append(number)
            torch.randn(400, 400) @ torch.randn(400, 400)

        return run

    timings = interleave({name: contender(name) for name in seen}, seconds=0)
    for name, numbers in seen.items():
        assert timings[name].samples >= 3
        assert timings[name].p10 <= timings[name].median <= timings[name].p90
        timed = numbers[len(numbers) - numbers[::-1].index(0) - 1 :]
        assert timed == list(range(len(timed)))


def test_take_turns_rotates_the_order() -> None:
    order: list[str] = []
    steps: list[int] = []
    contenders = {name: lambda _, name=name: order.append(name) for name in "abc"}
    timings = take_turns(contenders, 3, advance=lambda: steps.append(1))
    assert order == list("abcbcacab")
    assert len(steps) == 9 and all(timing.samples == 3 for timing in timings.values())
