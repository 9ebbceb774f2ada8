"""What an allocator with a prefix cache must do, on top of allocator_model.py.

What a slot holds is the number of a whole prefix: of its salt, the version of the weights, and all
tokens up to that one. So a block that is shared by mistake, or whose beginning was another one,
shows as a wrong number in memory, however alike its own tokens are.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from allocator_model import Model, Row


@dataclass
class PrefixRow(Row):
    """`tokens` are numbers of prefixes, `ids` the token ids that end them."""

    salt: int = 0
    ids: list[int] = field(default_factory=list)
    recorded: int = 0
    lost: bool = False  # what it records cannot be found
    restored: bool = False  # lost for ever, since its salt is not known
    planned: list[int] = field(default_factory=list)  # ids that it takes next

    def copy(self) -> PrefixRow:
        return replace(super().copy(), ids=list(self.ids), planned=list(self.planned))

    def cut(self, length: int) -> PrefixRow:
        return replace(
            super().cut(length),
            ids=self.ids[:length],
            recorded=min(self.recorded, length),
            lost=self.restored or (self.lost and length > 0),
            planned=list(self.planned),
        )


@dataclass
class PrefixModel(Model):
    """Also knows which prefixes can be found as long as nothing is evicted."""

    windows: tuple[int, ...] = ()
    version: int = 0  # of the weights
    prefixes: dict[tuple[int, int, int], int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def saved(self) -> PrefixModel:
        other = super().saved()
        other.known = set()
        for row in other.rows.values():
            row.lost = row.restored = True
        return other

    def new_row(self) -> PrefixRow:
        return PrefixRow([], [0] * self.allocator.groups)

    def next_token(self, row: PrefixRow) -> int:
        row.ids.append(row.planned.pop(0) if row.planned else self.random.randrange(2))
        return self.number(row.tokens[-1] if row.tokens else -1 - row.salt, row.ids[-1])

    def number(self, before: int, token: int) -> int:
        """Of the prefix that continues another with a token."""
        return self.prefixes.setdefault((before, token, self.version), len(self.prefixes))

    def numbers(self, ids: Sequence[int], salt: int) -> list[int]:
        numbers = [-1 - salt]
        for token in ids:
            numbers.append(self.number(numbers[-1], token))
        return numbers[1:]

    def allocate_cached(
        self,
        seqs: Sequence[int],
        hits: Sequence[int],
        prompts: Sequence[list[int]],
        salts: Sequence[int],
    ) -> None:
        for seq, hit, prompt, salt in zip(seqs, hits, prompts, salts, strict=True):
            dead = [max(0, hit - window) if window else 0 for window in self.windows]
            ids = prompt[:hit]
            numbers = self.numbers(ids, salt)
            self.rows[seq] = PrefixRow(numbers, dead, 0, salt, ids, hit, planned=prompt[hit:])

    def longest_known(self, ids: list[int], salt: int) -> int:
        known = [number in self.known for number in self.numbers(ids, salt)]
        return len(list(itertools.takewhile(bool, known)))

    def record(self, seqs: Sequence[int], counts: Sequence[int]) -> None:
        """Call it before the allocator's."""
        size = self.allocator.block_size
        for seq, count in zip(seqs, counts, strict=True):
            row = self.rows[seq]
            for end in range(row.recorded + 1, row.recorded + count + 1):
                if end % size == 0 and not row.lost:
                    row.lost = not self.add(seq, end)
            row.recorded += count

    def add(self, seq: int, end: int) -> bool:
        """Whether the block that ends there can be found, or was known already."""
        row, index = self.rows[seq], (end - 1) // self.allocator.block_size
        groups = range(self.allocator.groups)
        present = all(self.table(seq, group)[index] >= 0 for group in groups)
        if row.tokens[end - 1] not in self.known and not present:
            return False
        self.known.update(row.tokens[index * self.allocator.block_size : end])
        return True

    def end(self, seq: int) -> Row:
        """Call it before the allocator's."""
        row = self.rows[seq]
        if row.recorded % self.allocator.block_size and not row.lost:
            self.add(seq, row.recorded)
        return super().end(seq)

    def forget(self) -> None:
        self.version += 1
        self.known.clear()
        for row in self.rows.values():
            row.lost = True

    def verify(self) -> None:
        super().verify()
        allocator = self.allocator
        assert 0 <= allocator.num_cached <= allocator.num_free
        assert allocator.stats().cached_blocks == allocator.num_cached
        for row in self.rows.values():
            full = row.recorded // allocator.block_size * allocator.block_size
            if not row.lost and not any(row.dead):
                assert allocator.lookup([row.ids[:full]], row.salt).tolist() == [full]
