"""Scheduler and allocator driven together by Hypothesis, without a model."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pykvcache import BlockAllocator
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.request import Lanes, Request
from pykvcache.engine.scheduler import Scheduler
from pykvcache.engine.step import Options, Step


def fake_token(text: list[int]) -> int:
    """The token that follows a text: any function of all of it."""
    value = 7
    for token in text:
        value = (value * 31 + token + 1) % 65_521
    return value % 11


class FakeModel:
    """Stands for keys and values: remembers which text each slot of the pool was written with."""

    def __init__(self, scheduler: Scheduler, block_size: int) -> None:
        self.scheduler, self.block_size = scheduler, block_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}  # (group, slot) -> text up to it

    def run(self, step: Step) -> list[tuple[Request, int]]:
        """Write what the step computes, check what it reads; returns next tokens of done rows."""
        for group, pairs in enumerate(step.copies):
            for source, target in pairs.tolist():
                for offset in range(self.block_size):
                    key = (group, source * self.block_size + offset)
                    moved = (group, target * self.block_size + offset)
                    self.slots.pop(moved, None)
                    if key in self.slots:
                        self.slots[moved] = self.slots[key]
        chosen = []
        lanes, position = self.scheduler.lanes, 0
        for row, lane in enumerate(step.lanes.tolist()):
            start, count = int(step.starts[row]), int(step.counts[row])
            text = lanes.tokens[lane, : lanes.known[lane]].tolist()
            assert start + count <= len(text)
            for group in range(len(step.batch.slot_mappings)):
                slots = step.batch.slot_mappings[group][position : position + count].tolist()
                for i, slot in enumerate(slots):
                    self.slots[group, slot] = tuple(text[: start + i + 1])
            self.check_reads(step, row, start, count, text)
            position += count
            request = lanes.requests[lane]
            assert request is not None
            if step.wanted[row]:
                assert start + count == len(text)
                chosen.append((request, fake_token(text)))
        return chosen

    def check_reads(self, step: Step, row: int, start: int, count: int, text: list[int]) -> None:
        """Every position that the first query of the row sees holds its own text."""
        for group, table in enumerate(step.batch.block_tables):
            window = self.scheduler.blocks.windows[group]
            first = max(0, start - window + 1) if window else 0
            for position in range(first, start + count):
                slot = table[row, position // self.block_size] * self.block_size
                held = self.slots.get((group, int(slot) + position % self.block_size))
                assert held == tuple(text[: position + 1]), (group, position)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go, are preempted and cancelled; every output is that of a lonely request."""

    @initialize(
        num_blocks=st.integers(12, 40),
        block_size=st.integers(1, 5),
        windows=st.sampled_from([(0,), (4,), (0, 3)]),
        prefix_cache=st.booleans(),
        token_budget=st.integers(1, 20),
        max_running=st.integers(1, 6),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int, ...],
        prefix_cache: bool,
        token_budget: int,
        max_running: int,
    ) -> None:
        self.allocator = BlockAllocator(
            num_blocks,
            block_size,
            groups=len(windows),
            prefix_cache=prefix_cache,
            windows=windows if prefix_cache else (),
        )
        self.blocks = RequestBlocks(self.allocator, windows, (0,) * len(windows), prefix_cache)
        options = Options(token_budget, max_running, patience=4)
        self.scheduler = Scheduler(self.blocks, options)
        self.model = FakeModel(self.scheduler, block_size)
        self.live: list[Request] = []

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        new_tokens=st.integers(1, 8),
        priority=st.integers(0, 2),
        copies=st.integers(1, 3),
    )
    def submit(self, prompt: list[int], new_tokens: int, priority: int, copies: int) -> None:
        for _ in range(copies):
            array = np.array(prompt, np.int64)
            request = Request(array, len(prompt) + new_tokens, 0, 0, priority=priority)
            try:
                self.scheduler.check(request)
            except ValueError:
                return
            self.scheduler.submit(request)
            self.live.append(request)

    @rule(steps=st.integers(1, 6), fails=st.booleans())
    def run(self, steps: int, fails: bool) -> None:
        for _ in range(steps):
            step = self.scheduler.plan()
            if step is None:
                assert not self.live
                return
            assert step.num_tokens <= self.scheduler.options.token_budget
            if fails:
                self.scheduler.undo(step)
                return
            self.settle(step)

    def settle(self, step: Step) -> None:
        chosen = self.model.run(step)
        lanes = self.scheduler.lanes
        ids = lanes.ids(step.lanes, step.starts, step.counts)
        self.blocks.record(lanes.seqs[step.lanes], ids, step.counts)
        for request, token in chosen:
            heirs = []
            if lanes.known[request.lane] == len(request.prompt):
                heirs = self.blocks.prompt_computed(request)
            lanes.append(np.array([request.lane]), np.array([token]))
            for heir in heirs:
                assert len(heir.tokens) == len(heir.prompt)
                heir.tokens = np.append(heir.tokens, token)
            for one in [request, *heirs]:
                self.end_if_done(one)

    def end_if_done(self, request: Request) -> None:
        lanes = self.scheduler.lanes
        text = request.tokens
        if request.lane >= 0:
            text = lanes.tokens[request.lane, : lanes.known[request.lane]]
        if len(text) < request.limit:
            return
        wanted = request.prompt.tolist()
        while len(wanted) < request.limit:
            wanted.append(fake_token(wanted))
        assert text.tolist() == wanted
        self.scheduler.finish(request)
        self.live.remove(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        request = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.scheduler.finish(request)
        self.scheduler.finish(request)

    @precondition(lambda self: self.scheduler.num_running)
    @rule(data=st.data())
    def preempt(self, data: Any) -> None:
        running = [r for r in self.scheduler.lanes.requests if r is not None]
        self.scheduler.preempt(running[data.draw(st.integers(0, len(running) - 1))])

    @rule()
    def forget(self) -> None:
        if self.blocks.prefix_cache:
            self.allocator.forget_prefixes()

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "live"):
            return
        scheduler = self.scheduler
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)
        self.allocator.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        for _ in range(5000):
            step = self.scheduler.plan()
            if step is None:
                break
            self.settle(step)
        assert not self.live  # everybody was served
        assert self.allocator.num_sequences == 0
        assert self.allocator.num_free == self.allocator.num_blocks
        assert not self.blocks._families
        self.allocator.check_integrity()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


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
