"""Whom the scheduler admits, refuses and preempts, without a model."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from pykvcache import BlockAllocator
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.request import Lanes, Request
from pykvcache.engine.scheduler import Scheduler
from pykvcache.engine.step import Options, Step


def test_small_steps_serve_everybody_in_turn() -> None:
    """With a budget of one token, requests that generate take turns."""
    blocks = RequestBlocks(BlockAllocator(100, 4))
    scheduler = Scheduler(blocks, Options(token_budget=1))
    requests = [Request(np.array([i]), 4, 0, 0) for i in range(3)]
    for request in requests:
        scheduler.submit(request)
    order = []
    while (step := scheduler.plan()) is not None:
        lane = int(step.lanes[0])
        request = scheduler.lanes.requests[lane]
        assert request is not None
        order.append(requests.index(request))
        scheduler.lanes.append(step.lanes, np.array([1]))
        if scheduler.lanes.known[lane] == request.limit:
            scheduler.finish(request)
    assert len(order) == 9
    assert [order.count(i) for i in range(3)] == [3, 3, 3]


def test_head_room_is_kept_when_a_request_is_admitted() -> None:
    for head_room, running in ((0.0, 4), (0.5, 2)):
        blocks = RequestBlocks(BlockAllocator(16, 4))
        scheduler = Scheduler(blocks, Options(head_room=head_room))
        for i in range(5):
            scheduler.submit(Request(np.full(16, i), 20, 0, 0))
        scheduler.plan()
        assert scheduler.num_running == running


def test_the_cheapest_of_the_least_important_is_preempted() -> None:
    blocks = RequestBlocks(BlockAllocator(64, 4))
    scheduler = Scheduler(blocks, Options(head_room=0.0))
    lengths, priorities = (30, 20, 5, 9), (0, 0, 1, 0)
    requests = [
        Request(np.arange(n) + 100 * i, n + 30, 0, 0, priority=p)
        for i, (n, p) in enumerate(zip(lengths, priorities, strict=True))
    ]
    for request in requests:
        scheduler.submit(request)
    scheduler.plan()
    assert scheduler.num_running == 4
    victims = []
    while (victim := scheduler._victim()) is not None:
        victims.append(requests.index(victim))
        scheduler.preempt(victim)
    assert victims == [3, 1, 0]  # the important one stands first in the queue
    assert [entry.tokens for entry in scheduler.preemptions] == [9, 20, 30]
    assert scheduler.recomputed_tokens == 59


def test_requests_that_can_never_fit_are_refused_with_the_numbers() -> None:
    scheduler = Scheduler(RequestBlocks(BlockAllocator(5, 4)), Options())
    scheduler.check(Request(np.arange(5), 21, 0, 0))  # 20 tokens are stored
    with pytest.raises(ValueError, match="5 prompt tokens, 22 with its output, needs 6 blocks"):
        scheduler.check(Request(np.arange(5), 22, 0, 0))


def test_admission_takes_a_time_in_proportion_to_the_requests() -> None:
    """Four times as many requests take about four times the bytecodes; 16 if quadratic."""

    def opcodes(count: int) -> int:
        blocks = RequestBlocks(BlockAllocator(2 * count, 16))
        scheduler = Scheduler(blocks, Options(10 * count, count))
        for i in range(count):
            scheduler.submit(Request(np.array([i, 1, 2]), 9, 0, 0))
        executed = 0

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal executed
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            executed += event == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            scheduler.plan()
        finally:
            sys.settrace(before)
        assert scheduler.num_running == count
        return executed

    assert opcodes(240) < 5 * opcodes(60)


def test_lanes_count_those_who_run() -> None:
    lanes = Lanes(5)
    requests = [Request(np.array([i]), 4, 10 - i, i, seq=i) for i in range(4)]
    for count, request in enumerate(requests):
        assert (lanes.num_running, lanes.num_free) == (count, 5 - count)
        lanes.place(request)
    assert [lanes.requests[lane] for lane in lanes.active] == requests[::-1]
    lanes.remove(requests[1].lane)
    lanes.remove(requests[3].lane)
    assert (lanes.num_running, lanes.num_free) == (2, 3)
    assert [lanes.requests[lane] for lane in lanes.active] == [requests[2], requests[0]]


def test_a_long_cached_prefix_is_not_looked_up_in_each_step_that_has_no_room() -> None:
    allocator = BlockAllocator(5000, 8, prefix_cache=True)
    scheduler = Scheduler(
        RequestBlocks(allocator, prefix_cache=True), Options(token_budget=2000, head_room=0.0)
    )
    lookups = 0
    original = allocator.allocate_cached

    def counting(*args: Any) -> Any:
        nonlocal lookups
        lookups += 1
        return original(*args)

    allocator.allocate_cached = counting  # type: ignore[method-assign]
    prefix = np.arange(36_000)

    def compute(step: Step) -> None:
        lanes = scheduler.lanes
        ids = lanes.ids(step.lanes, step.starts, step.counts)
        scheduler.blocks.record(lanes.seqs[step.lanes], ids, step.counts)
        rows = step.lanes[step.wanted > 0]
        lanes.append(rows, np.ones(len(rows), np.int64))

    def steps(count: int) -> None:
        for _ in range(count):
            step = scheduler.plan()
            assert step is not None
            compute(step)

    first = Request(prefix, len(prefix) + 1, 0, 0)
    scheduler.submit(first)
    steps(18)
    scheduler.finish(first)
    other = Request(-prefix[:4000], 4100, 0, 0)  # 500 of the 5,000 blocks
    scheduler.submit(other)
    steps(2)
    waiting = Request(np.append(prefix, np.zeros(3000, np.int64)), 39_010, 0, 0)  # 4,876 blocks
    scheduler.submit(waiting)
    lookups = 0
    steps(40)
    assert scheduler.num_waiting == 1 and 40 // 6 <= lookups <= 40 // 4 + 1
    scheduler.finish(other)
    steps(1)
    assert scheduler.num_waiting == 0 and waiting.cached > 35_900  # `other` took a few blocks
