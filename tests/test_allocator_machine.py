"""Random operations on an allocator, against the model of allocator_model.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from allocator_model import Model, Reach
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pykvcache.allocator import Batch, BlockAllocator, DoubleFree, OutOfBlocks, UnknownSequence

COUNTS = st.integers(0, 9)


def has_rows(machine: AllocatorMachine) -> bool:
    return bool(machine.model.rows)


class AllocatorMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 40), block_size=st.integers(1, 5), groups=st.integers(1, 2)
    )
    def create(self, num_blocks: int, block_size: int, groups: int) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, groups)
        self.model = Model(self.allocator)
        self.gone: list[int] = []
        self.reach = Reach((0,) * groups, (0,) * groups)
        self.batch, self.batch_rows = self.allocator.batch([]), []
        self.saved: tuple[bytes, Model] | None = None

    def draw_rows(self, data: st.DataObject, most: int = 4) -> list[int]:
        return data.draw(
            st.lists(st.sampled_from(list(self.model.rows)), unique=True, max_size=most), "rows"
        )

    def draw_for(self, data: st.DataObject, rows: list[int], values: st.SearchStrategy) -> list:
        return data.draw(st.lists(values, min_size=len(rows), max_size=len(rows)), "values")

    def visible(self) -> list:
        groups = range(self.allocator.groups)
        tables = [self.model.table(seq, g) for seq in self.model.rows for g in groups]
        return [tables, self.allocator.lengths(list(self.model.rows)).tolist()]

    @rule(lengths=st.lists(st.integers(0, 12), max_size=3))
    def allocate(self, lengths: list[int]) -> None:
        needed = sum(map(self.model.blocks_for, lengths)) * self.allocator.groups
        if needed > self.allocator.num_free:
            self.expect_refusal(lambda: self.allocator.allocate(lengths), needed)
        else:
            seqs = self.allocator.allocate(lengths).tolist()
            self.model.allocate(seqs, lengths)

    def expect_refusal(
        self, call: Callable[[], object], needed: int, free: int | None = None
    ) -> None:
        before = self.visible()
        with pytest.raises(OutOfBlocks) as error:
            call()
        assert error.value.needed == needed
        assert error.value.free == (self.allocator.num_free if free is None else free)
        assert error.value.total == self.allocator.num_blocks
        assert self.visible() == before

    @precondition(has_rows)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        counts = self.draw_for(data, rows, COUNTS)
        needed, free = self.model.append_cost(rows, counts)
        if needed > free:
            self.expect_refusal(lambda: self.allocator.append(rows, counts), needed)
        else:
            self.model.copy_blocks(self.allocator.append(rows, counts))
            self.model.write(rows, counts)

    @precondition(has_rows)
    @rule(data=st.data(), n=st.integers(0, 3))
    def fork(self, data: st.DataObject, n: int) -> None:
        rows = self.draw_rows(data, most=2)
        children = self.allocator.fork(rows, n).tolist()
        parents = [row for row in rows for _ in range(n)]
        for child, parent in zip(children, parents, strict=True):
            self.model.rows[child] = self.model.rows[parent].copy()

    @precondition(has_rows)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        index = data.draw(
            st.lists(st.integers(0, len(rows) - 1), max_size=5) if rows else st.just([])
        )
        kept = {rows[i]: self.model.rows[rows[i]] for i in index}
        for row in rows:
            self.model.rows.pop(row) if row in kept else self.model.end(row)
        selected = self.allocator.select(rows, index).tolist()
        self.gone += rows
        first: set[int] = set()
        for seq, i in zip(selected, index, strict=True):
            self.model.rows[seq] = kept[rows[i]].copy()
            if i not in first:
                self.model.rows[seq].reserved = kept[rows[i]].reserved
            first.add(i)

    @precondition(has_rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        lengths = [
            data.draw(st.integers(0, len(self.model.rows[row].tokens)), "length") for row in rows
        ]
        size = self.allocator.block_size
        kept_from = [max(dead // size * size for dead in self.model.rows[r].dead) for r in rows]
        if any(0 < n < kept for n, kept in zip(lengths, kept_from, strict=True)):
            before = self.allocator.snapshot()
            with pytest.raises(ValueError, match="were released"):
                self.allocator.truncate(rows, lengths)
            assert self.allocator.snapshot() == before
            return
        self.allocator.truncate(rows, lengths)
        for seq, length in zip(rows, lengths, strict=True):
            self.model.rows[seq] = self.model.rows[seq].cut(length)

    @precondition(has_rows)
    @rule(data=st.data())
    def release_before(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        positions = self.draw_for(data, rows, st.integers(-2, 40))
        group = data.draw(st.integers(0, self.allocator.groups - 1), "group")
        self.allocator.release_before(rows, positions, group)
        for row, position in zip(rows, positions, strict=True):
            self.model.release(row, group, position)

    @precondition(has_rows)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data, most=2)
        capacities = self.draw_for(data, rows, st.integers(0, 20))
        missing = [
            max(0, self.model.blocks_for(capacity) - len(self.model.table(row, 0)))
            for row, capacity in zip(rows, capacities, strict=True)
        ]
        needed = sum(missing) * self.allocator.groups
        if needed > self.allocator.num_free:
            self.expect_refusal(lambda: self.allocator.reserve(rows, capacities), needed)
            return
        self.allocator.reserve(rows, capacities)
        for seq, capacity in zip(rows, capacities, strict=True):
            row = self.model.rows[seq]
            row.reserved = max(row.reserved, capacity)

    @precondition(has_rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.free_rows(self.draw_rows(data))

    def free_rows(self, rows: list[int]) -> None:
        for row in rows:
            self.model.end(row)
        self.allocator.free(rows)
        self.gone += rows

    @precondition(has_rows)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data, most=1)
        blocks = self.allocator.pin_sequences(rows).tolist()
        self.model.pins.update(blocks)
        self.allocator.pin(blocks[:1])
        self.model.pins.update(blocks[:1])

    @precondition(lambda machine: machine.model.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = list(self.model.pins.elements())
        blocks = pinned[: data.draw(st.integers(1, len(pinned)), "pins")]
        self.allocator.unpin(blocks)
        self.model.pins.subtract(blocks)
        self.model.pins += type(self.model.pins)()

    @rule(more=st.integers(0, 3))
    def grow(self, more: int) -> None:
        self.allocator.grow(self.allocator.num_blocks + more)

    @precondition(lambda machine: machine.gone)
    @rule(data=st.data())
    def use_after_free(self, data: st.DataObject) -> None:
        stale = data.draw(st.sampled_from(self.gone), "stale")
        before = self.allocator.snapshot()
        with pytest.raises(DoubleFree, match="before"):
            self.allocator.free([*self.model.rows, stale])
        with pytest.raises(UnknownSequence, match="before"):
            self.allocator.append([*self.model.rows, stale], 1)
        assert self.allocator.snapshot() == before

    @rule(data=st.data())
    def set_reach(self, data: st.DataObject) -> None:
        reach = st.tuples(*[st.integers(0, 7)] * self.allocator.groups)
        self.reach = Reach(data.draw(reach, "windows"), data.draw(reach, "chunks"))
        self.batch.set_reach(self.reach.windows, self.reach.chunks)

    @precondition(has_rows)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        self.batch_rows = self.draw_rows(data)
        self.batch.bind(self.batch_rows)

    @precondition(has_rows)
    @rule(data=st.data(), padded=st.booleans(), release=st.booleans())
    def step(self, data: st.DataObject, padded: bool, release: bool) -> None:
        rows = [row for row in self.batch_rows if row in self.model.rows]
        if rows != self.batch_rows or not rows:
            self.bind(data)
            rows = self.batch_rows
        counts = self.draw_for(data, rows, COUNTS)
        width = data.draw(st.integers(max(counts, default=0), 9), "width") if padded else 0
        reach = self.reach if release else None
        needed, free = self.model.append_cost(rows, counts, reach)
        if needed > free:
            self.expect_refusal(lambda: self.batch.step(counts, width, release), needed, free)
            return
        copies = self.batch.step(counts, width, release)
        for row in rows if release else ():
            for group in range(self.allocator.groups):
                dead = self.reach.dead(group, len(self.model.rows[row].tokens))
                self.model.release(row, group, dead)
        self.model.copy_blocks(copies)
        self.model.write(rows, counts)
        self.check_arrays(self.batch, rows, counts, width)

    def check_arrays(self, batch: Batch, rows: list[int], counts: list[int], width: int) -> None:
        assert batch.seq_lens.tolist() == self.allocator.lengths(rows).tolist()
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + (width or count))
        assert batch.cu_seqlens_q.tolist() == starts
        assert batch.num_tokens == starts[-1]
        assert batch.max_seqlen_q == (width or max(counts, default=0))
        for group in range(self.allocator.groups):
            wanted = self.allocator.block_table(rows, group)
            table = batch.block_tables[group]
            assert table[:, : wanted.shape[1]].tolist() == wanted.tolist()
            assert (table[:, wanted.shape[1] :] == -1).all()
            slots = self.allocator.slot_mapping(rows, counts, group, width)
            assert batch.slot_mappings[group].tolist() == slots.tolist()

    @rule()
    def save(self) -> None:
        self.saved = (self.allocator.snapshot(), self.model.saved())

    @precondition(lambda machine: machine.saved)
    @rule()
    def restore(self) -> None:
        assert self.saved is not None
        snapshot, state = self.saved
        self.gone = [seq for seq in (*self.gone, *self.model.rows) if seq not in state.rows]
        self.allocator.restore(snapshot)
        state.allocator = self.allocator
        self.model, self.saved = state, None

    @rule()
    def move_to_clone(self) -> None:
        original = self.allocator
        self.allocator = self.model.allocator = original.clone()
        original.free(list(self.model.rows))
        original.check_integrity()
        self.batch = self.allocator.batch(
            self.batch_rows, windows=self.reach.windows, chunks=self.reach.chunks
        )

    @invariant()
    def agrees_with_model(self) -> None:
        if hasattr(self, "model"):
            self.model.verify()


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
