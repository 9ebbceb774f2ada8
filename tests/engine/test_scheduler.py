"""Scheduler and allocator driven together by Hypothesis, without a model."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from pykvcache import BlockAllocator
from pykvcache.cache import KVPool
from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.family import Family
from pykvcache.engine.request import Request
from pykvcache.engine.scheduler import Scheduler
from pykvcache.engine.step import Options, Step
from pykvcache.engine.swap import SwapSpace


def fake_token(text: list[int]) -> int:
    """The token that follows a text: any function of all of it."""
    value = 7
    for token in text:
        value = (value * 31 + token + 1) % 65_521
    return value % 11


def text_id(text: list[int]) -> int:
    """A number for a text."""
    return hash(tuple(text))


class FakePool:
    """Stands for keys and values: per slot which text was computed, and with which weights."""

    def __init__(self, groups: int, num_blocks: int, block_size: int) -> None:
        self.device = torch.device("cpu")
        self.texts = torch.zeros(groups, num_blocks, block_size, dtype=torch.int64)
        self.epochs = torch.zeros_like(self.texts)

    def group_storages(self, group: int) -> list[Tensor]:
        """[blocks, elements] each, as of a KVPool."""
        return [self.texts[group], self.epochs[group]]


class FakeModel:
    """Fills the slots of a pool and checks what the rows of a step would read there."""

    def __init__(self, scheduler: Scheduler, pool: FakePool) -> None:
        self.scheduler, self.pool = scheduler, pool
        self.epoch = 0  # how often its weights have changed
        self.since: dict[Request, int] = {}  # with which weights a running request began

    def look(self) -> None:
        """Before a step: forget those that do not run any more."""
        running = self.scheduler.lanes.requests
        self.since = {request: epoch for request, epoch in self.since.items() if request in running}

    def run(self, step: Step) -> list[tuple[Request, int]]:
        """Write what the step computes, check what it reads; returns next tokens of done rows."""
        for group, pairs in enumerate(step.copies):
            sources, targets = torch.from_numpy(pairs).unbind(1)
            for storage in self.pool.group_storages(group):
                storage[targets] = storage[sources]
        chosen = []
        lanes, position = self.scheduler.lanes, 0
        for row, lane in enumerate(step.lanes.tolist()):
            start, count = int(step.starts[row]), int(step.counts[row])
            text = lanes.tokens[lane, : lanes.known[lane]].tolist()
            assert start + count <= len(text)
            request = lanes.requests[lane]
            assert request is not None
            since = self.since.setdefault(request, self.epoch)
            written = torch.tensor([text_id(text[: start + i + 1]) for i in range(count)])
            for group in range(len(step.batch.slot_mappings)):
                slots = step.batch.slot_mappings[group][position : position + count]
                self.pool.texts[group].view(-1)[slots] = written
                self.pool.epochs[group].view(-1)[slots] = self.epoch
            self.check_reads(step, row, start, text[: start + count], since)
            position += count
            if request.logits_from >= 0:  # its tokens are known; -1: they are all scored
                assert step.wanted[row] == max(0, start + count - max(start, request.logits_from))
                if start + count == len(text):
                    chosen.append((request, -1))
            elif step.wanted[row]:
                assert start + count == len(text)
                chosen.append((request, fake_token(text)))
        return chosen

    def check_reads(self, step: Step, row: int, start: int, text: list[int], since: int) -> None:
        """What the first query of the row sees is its own text by weights since it began."""
        size = self.pool.texts.shape[2]
        for group, table in enumerate(step.batch.block_tables):
            window = self.scheduler.blocks.windows[group]
            first = max(0, start - window + 1) if window else 0
            seen = np.arange(first, len(text))
            slots = table[row][seen // size], seen % size
            wanted = [text_id(text[: position + 1]) for position in seen.tolist()]
            assert self.pool.texts[group][slots].tolist() == wanted, (group, first)
            assert min(self.pool.epochs[group][slots].tolist()) >= since, (group, first)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go, are preempted and cancelled; every output is that of a lonely request."""

    @initialize(
        num_blocks=st.integers(12, 40),
        block_size=st.integers(1, 5),
        windows=st.sampled_from([(0,), (4,), (0, 3)]),
        prefix_cache=st.booleans(),
        token_budget=st.integers(1, 20),
        max_running=st.integers(1, 6),
        swap_limit=st.sampled_from([0, 600, 10**9]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        windows: tuple[int, ...],
        prefix_cache: bool,
        token_budget: int,
        max_running: int,
        swap_limit: int,
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
        pool = FakePool(len(windows), num_blocks, block_size)
        self.swap = SwapSpace(cast(KVPool, pool), self.blocks, swap_limit)
        self.swap.copy_seconds = lambda nbytes: 0.0  # type: ignore[method-assign]
        self.scheduler = Scheduler(
            self.blocks, options, self.swap.take, self.swap.restore, self.swap.drop
        )
        self.model = FakeModel(self.scheduler, pool)
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

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=10),
        completions=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=5),
    )
    def score(self, prompt: list[int], completions: list[list[int]]) -> None:
        family = Family(None, len(prompt) - 1)
        array = np.array(prompt, np.int64)
        for completion in completions:
            limit = len(prompt) + len(completion) + 1
            request = Request(array, limit, 0, 0, logits_from=len(prompt) - 1)
            request.output, request.family = np.array(completion, np.int64), family
            try:
                self.scheduler.check(request)
            except ValueError:
                return
            self.scheduler.submit(request)
            self.live.append(request)

    @rule(steps=st.integers(1, 6), fails=st.booleans())
    def run(self, steps: int, fails: bool) -> None:
        for _ in range(steps):
            self.model.look()
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
            if token < 0:
                self.scheduler.finish(request)
                self.live.remove(request)
                continue
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

    @rule()
    def change_weights(self) -> None:
        self.model.epoch += 1
        self.blocks.forget()

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "live"):
            return
        scheduler = self.scheduler
        assert scheduler.num_running + scheduler.num_waiting == len(self.live)
        self.allocator.check_integrity()

    @invariant()
    def a_request_has_blocks_or_a_copy_or_nothing(self) -> None:
        if not hasattr(self, "live"):
            return
        copies = [request.swapped for request in self.live if request.swapped is not None]
        assert self.swap.used == sum(copy.nbytes for copy in copies) <= self.swap.limit
        for request in self.live:
            if request.lane >= 0:
                assert request.seq is not None and request.swapped is None
                continue
            copy, family = request.swapped, request.family
            assert request.seq is None and family is not None
            if copy is None or copy.epoch == self.blocks.epoch:  # else it is given up later
                covered = copy is not None and len(copy.tokens) >= family.length
                assert covered != (request.order in {**family.fresh, **family.heirs})

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        for _ in range(5000):
            self.model.look()
            step = self.scheduler.plan()
            if step is None:
                break
            self.settle(step)
        assert not self.live  # everybody was served
        assert self.allocator.num_sequences == 0
        assert self.allocator.num_free == self.allocator.num_blocks
        assert not self.blocks._families and not self.blocks.kept
        assert self.swap.used == 0
        self.allocator.check_integrity()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_blocks_kept_for_others_do_not_stop_the_only_one_who_runs() -> None:
    """Its prompt's blocks have left its window, but are kept for a twin that has no lane."""
    machine = SchedulerMachine()
    machine.start(
        num_blocks=28,
        block_size=1,
        windows=(0, 3),
        prefix_cache=False,
        token_budget=14,
        max_running=1,
        swap_limit=0,
    )
    machine.submit(prompt=[0] * 14, new_tokens=2, priority=0, copies=2)
    machine.run(steps=2, fails=False)
    machine.teardown()
