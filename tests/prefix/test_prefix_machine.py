"""Random operations on an allocator with a prefix cache, against the model of prefix_model.py.

All rules of test_allocator_machine.py take part too. Prompts consist of two token ids, so that
prefixes are shared, merged and continued in every way.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from prefix_model import PrefixModel
from test_allocator_machine import AllocatorMachine, has_rows

from pykvcache.allocator import BlockAllocator

PROMPTS = st.lists(st.integers(0, 1), max_size=14)
SALTS = st.sampled_from([0, 0, 0, 5])


class PrefixMachine(AllocatorMachine):
    @initialize(
        num_blocks=st.sampled_from([3, 6, 10, 20, 2000]),
        block_size=st.integers(1, 4),
        windows=st.lists(st.sampled_from([0, 0, 1, 3, 6]), min_size=1, max_size=2),
        collide=st.booleans(),
        eager=st.sampled_from([True, True, False]),
    )
    def create(
        self, num_blocks: int, block_size: int, windows: list[int], collide: bool, eager: bool
    ) -> None:
        super().create(num_blocks, block_size, len(windows))
        self.allocator = BlockAllocator(
            num_blocks, block_size, len(windows), prefix_cache=True, windows=windows
        )
        if collide:
            self.allocator._core._collide_hashes()
        self.model = PrefixModel(self.allocator, windows=tuple(windows))
        self.batch = self.allocator.batch([])
        self.eager = eager

    def is_exact(self) -> bool:
        """Nothing was evicted or overwritten, and every block of a prefix has to be there."""
        return self.allocator.num_blocks >= 2000 and not any(self.model.windows)

    @rule(data=st.data(), rows=st.integers(0, 3))
    def allocate_cached(self, data: st.DataObject, rows: int) -> None:
        self.start_rows(data, rows)

    def start_rows(self, data: st.DataObject, rows: int) -> list[int]:
        prompts = [self.draw_prompt(data) for _ in range(rows)]
        salts = [data.draw(SALTS, "salt") for _ in prompts]
        before = self.allocator.snapshot(), self.allocator.num_cached
        found = self.allocator.lookup(prompts, salts).tolist()
        assert before == (self.allocator.snapshot(), self.allocator.num_cached)
        seqs, hits = self.allocator.allocate_cached(prompts, salts)
        assert hits.tolist() == found
        wanted = [self.model.longest_known(p, s) for p, s in zip(prompts, salts, strict=True)]
        if self.is_exact():
            assert hits.tolist() == wanted
        assert all(hit <= most for hit, most in zip(hits.tolist(), wanted, strict=True))
        self.model.allocate_cached(seqs.tolist(), hits.tolist(), prompts, salts)
        return seqs.tolist()

    @rule(data=st.data(), keep=st.booleans())
    def serve(self, data: st.DataObject, keep: bool) -> None:
        """A request from its prompt to its end."""
        rows = self.start_rows(data, 1)
        counts = [len(self.model.rows[row].planned) for row in rows]
        needed, free = self.model.append_cost(rows, counts)
        if needed <= free:
            self.model.copy_blocks(self.allocator.append(rows, counts))
            self.model.write(rows, counts)
            self.record_rows(rows, counts)
        if not keep:
            self.free_rows(rows)

    def draw_prompt(self, data: st.DataObject) -> list[int]:
        if self.model.rows and data.draw(st.booleans(), "of a row"):
            row = self.model.rows[data.draw(st.sampled_from(list(self.model.rows)), "row")]
            return row.ids[: data.draw(st.integers(0, len(row.ids)), "length")]
        return data.draw(PROMPTS, "prompt")

    @precondition(has_rows)
    @rule(data=st.data())
    def record(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        missing = [len(self.model.rows[r].tokens) - self.model.rows[r].recorded for r in rows]
        self.record_rows(rows, [data.draw(st.integers(0, n), "count") for n in missing])

    @invariant()
    def record_all(self) -> None:
        if getattr(self, "eager", False):
            rows = list(self.model.rows)
            states = self.model.rows.values()
            self.record_rows(rows, [len(row.tokens) - row.recorded for row in states])

    def record_rows(self, rows: list[int], counts: list[int]) -> None:
        states = [self.model.rows[row] for row in rows]
        ids = [
            token
            for row, count in zip(states, counts, strict=True)
            for token in row.ids[row.recorded : row.recorded + count]
        ]
        self.model.record(rows, counts)
        self.allocator.record(rows, ids, counts)

    @precondition(has_rows)
    @rule(data=st.data())
    def set_priority(self, data: st.DataObject) -> None:
        rows = self.draw_rows(data)
        self.allocator.set_priority(rows, self.draw_for(data, rows, st.integers(-2, 2)))

    @rule(really=st.integers(0, 3))
    def forget(self, really: int) -> None:
        if really == 0:
            self.allocator.forget_prefixes()
            self.model.forget()
            assert self.allocator.num_cached == 0


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
