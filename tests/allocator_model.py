"""What a block allocator must do, written with dicts and a memory that its block ids stand for.

Every token is a number of its own. The model writes tokens where the allocator says and reads them
back through the block tables, so a missing copy, a block given to two owners or a wrong slot shows
as a wrong token.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pykvcache.allocator import BlockAllocator


@dataclass
class Row:
    """One sequence: its tokens, and for each group the first position that may still be read."""

    tokens: list[int]
    dead: list[int]
    reserved: int = 0

    def copy(self) -> Row:
        return replace(self, tokens=list(self.tokens), dead=list(self.dead), reserved=0)

    def cut(self, length: int) -> Row:
        return replace(
            self, tokens=self.tokens[:length], dead=[min(d, length) for d in self.dead], reserved=0
        )


@dataclass
class Reach:
    """What the groups of a batch still read of the past; 0 = everything."""

    windows: tuple[int, ...]
    chunks: tuple[int, ...]

    def dead(self, group: int, length: int) -> int:
        if self.chunks[group]:
            return length // self.chunks[group] * self.chunks[group]
        return max(0, length - self.windows[group] + 1) if self.windows[group] else 0


@dataclass
class Model:
    """Mirror of one allocator; the operations follow its names."""

    allocator: BlockAllocator
    rows: dict[int, Row] = field(default_factory=dict)
    pins: Counter[int] = field(default_factory=Counter)
    memory: dict[int, int] = field(default_factory=dict)
    fresh: itertools.count[int] = field(default_factory=itertools.count)

    def saved(self) -> Model:
        """A copy to go back to; tokens are not used twice."""
        other = copy.copy(self)
        other.rows, other.pins = copy.deepcopy((self.rows, self.pins))
        other.memory = dict(self.memory)
        return other

    def end(self, seq: int) -> Row:
        """The sequence is gone."""
        return self.rows.pop(seq)

    def next_token(self, row: Row) -> int:
        return next(self.fresh)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.allocator.block_size)

    def table(self, seq: int, group: int) -> list[int]:
        """The row's blocks without the padding that other rows may cause."""
        return self.allocator.block_table([seq], group)[0].tolist()

    def references(self) -> Counter[int]:
        """Owners of each block in use."""
        refs = Counter(self.pins)
        for seq in self.rows:
            for group in range(self.allocator.groups):
                refs.update(block for block in self.table(seq, group) if block >= 0)
        return refs

    def append_cost(
        self, seqs: Sequence[int], counts: Sequence[int], reach: Reach | None = None
    ) -> tuple[int, int]:
        """(new blocks that an append needs, blocks that are free for it)."""
        refs, needed = self.references(), 0
        groups, size = range(self.allocator.groups), self.allocator.block_size
        for seq, group in itertools.product(seqs, groups if reach else ()):
            assert reach is not None
            end = reach.dead(group, len(self.rows[seq].tokens)) // size
            refs.subtract(block for block in self.table(seq, group)[:end] if block >= 0)
        free = self.allocator.num_blocks - sum(count > 0 for count in refs.values())
        for (seq, count), group in itertools.product(zip(seqs, counts, strict=True), groups):
            table, length = self.table(seq, group), len(self.rows[seq].tokens)
            end = self.blocks_for(length + count)
            for block in table[length // size : end] if count else []:
                if refs[block] > 1:
                    refs[block] -= 1
                    needed += 1
            needed += max(0, end - len(table))
        return needed, free

    def new_row(self) -> Row:
        return Row([], [0] * self.allocator.groups)

    def allocate(self, seqs: Sequence[int], lengths: Sequence[int]) -> None:
        for seq, length in zip(seqs, lengths, strict=True):
            self.rows[seq] = self.new_row()
            self.write([seq], [length])

    def copy_blocks(self, copies: Sequence[np.ndarray]) -> None:
        size = self.allocator.block_size
        sources = {src for pairs in copies for src, _ in pairs.tolist()}
        targets = [dst for pairs in copies for _, dst in pairs.tolist()]
        assert len(set(targets)) == len(targets) and not sources.intersection(targets)
        for src, dst in (pair for pairs in copies for pair in pairs.tolist()):
            for offset in range(size):
                self.memory[dst * size + offset] = self.memory.get(src * size + offset, -1)

    def write(self, seqs: Sequence[int], counts: Sequence[int]) -> None:
        """Store new tokens of an append that has happened, in every group."""
        mappings = [
            self.allocator.slot_mapping(seqs, counts, group).tolist()
            for group in range(self.allocator.groups)
        ]
        at = 0
        for seq, count in zip(seqs, counts, strict=True):
            for _ in range(count):
                token = self.next_token(self.rows[seq])
                self.rows[seq].tokens.append(token)
                for slots in mappings:
                    self.memory[slots[at]] = token
                at += 1

    def release(self, seq: int, group: int, position: int) -> None:
        row = self.rows[seq]
        row.dead[group] = max(row.dead[group], min(position, len(row.tokens)))

    def readable(self, seq: int, group: int) -> dict[int, int]:
        """Token of every slot that layers of the group may read."""
        table, row, size = self.table(seq, group), self.rows[seq], self.allocator.block_size
        positions = range(row.dead[group], len(row.tokens))
        return {table[p // size] * size + p % size: row.tokens[p] for p in positions}

    def verify(self) -> None:
        """Assert that the allocator agrees with the model in everything that can be seen."""
        allocator, size = self.allocator, self.allocator.block_size
        allocator.check_integrity()
        seqs, live, entries = list(self.rows), 0, 0
        lengths = [len(row.tokens) for row in self.rows.values()]
        assert allocator.lengths(seqs).tolist() == lengths
        assert allocator.num_sequences == len(seqs)
        for group in range(allocator.groups):
            used: dict[int, int] = {}
            for seq, row in self.rows.items():
                table, holes = self.table(seq, group), row.dead[group] // size
                wanted = max(self.blocks_for(len(row.tokens)), self.blocks_for(row.reserved))
                assert len(table) == wanted
                assert table[:holes] == [-1] * holes and min(table[holes:], default=0) >= 0
                readable = self.readable(seq, group)
                assert {slot: self.memory[slot] for slot in readable} == readable
                used |= readable
                entries += len(table) - holes
            live += len(used)
        refs = self.references()
        in_use = sum(count > 0 for count in refs.values())
        assert allocator.num_free == allocator.num_blocks - in_use
        stats = allocator.stats()
        shares = (stats.live, stats.reserved, stats.internal, stats.external, stats.idle)
        assert sum(shares) + stats.rounding == allocator.num_blocks * size
        assert stats.live == live and stats.table_entries == entries
        assert sum(stats.percent().values()) == 100
