"""A second replay simulator, written from the definitions: one step, one slot, one row at a time.

It shares no code with pykvcache.bench.replay. Memory is a list with an owner for every slot, blocks
are counted, and sums are taken after every step. Slow; for a few hundred short requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHARES = ("live", "reserved", "internal", "rounding", "external")


def power_of_two(n: int) -> int:
    size = 1
    while size < n:
        size *= 2
    return size


@dataclass(eq=False)
class Row:
    prompt: int
    output: int
    arrival: float
    cached: int = 0
    generated: int = 0
    place: tuple[int, int, int] | None = None  # address, asked, granted
    blocks: int = 0
    preempted: bool = False
    swapped: bool = False

    @property
    def final(self) -> int:
        return self.prompt + self.output - 1


class Memory:
    """Contiguous regions, found by looking at every slot."""

    def __init__(self, slots: int, policy: str, max_len: int, use_rest: bool) -> None:
        self.used = [False] * slots
        self.policy, self.max_len = policy, max_len
        self.top = power_of_two(max_len)
        while self.top > slots:
            self.top //= 2
        self.cuts = []  # (start, size) of the buddies that make up the memory
        start, size = 0, self.top
        while start + size <= slots:
            self.cuts.append((start, size))
            start += size
        while size > 1 and (use_rest or slots - slots // self.top * self.top >= max_len):
            size //= 2
            if start + size <= slots:
                self.cuts.append((start, size))
                start += size

    def asked(self, row: Row) -> int:
        if self.policy == "max-length":
            return self.max_len
        if self.policy == "power-of-two":
            return min(row.prompt + power_of_two(row.output), self.max_len)
        return row.final

    def place(self, row: Row) -> bool:
        asked = self.asked(row)
        if self.policy == "max-length":
            granted = asked
            starts = [i for i in range(0, len(self.used) - asked + 1, asked)]
            free = [(i, asked) for i in starts if not any(self.used[i : i + asked])]
        elif self.policy == "oracle-first-fit":
            granted, free, run = asked, [], 0
            for i, used in enumerate([*self.used, True]):
                if used and run >= asked:
                    free.append((i - run, run))
                run = 0 if used else run + 1
        else:
            granted, free = power_of_two(asked), []
            for start, size in self.cuts:
                free += [hole for hole in self.holes(start, size) if hole[1] >= granted]
            free.sort(key=lambda hole: (hole[1], hole[0]))
        if not free:
            return False
        row.place = free[0][0], asked, granted
        self.mark(row, True)
        return True

    def holes(self, start: int, size: int) -> list[tuple[int, int]]:
        """Largest free buddies within a region."""
        if not any(self.used[start : start + size]):
            return [(start, size)]
        if size == 1:
            return []
        return self.holes(start, size // 2) + self.holes(start + size // 2, size // 2)

    def mark(self, row: Row, used: bool) -> None:
        address, _, granted = row.place
        assert all(slot != used for slot in self.used[address : address + granted])
        self.used[address : address + granted] = [used] * granted


@dataclass
class Simulation:
    requests: list[tuple[int, int, float]]
    policy: str
    slots: int
    max_len: int
    block_size: int = 0
    head_room: float = 0.0
    cost: tuple[float, float, float] = (6e-3, 45e-9, 45e-6)
    victim: str = "newest"
    swap_cost: float | None = None
    shortest_first: bool = False
    use_rest: bool = False

    seconds: float = 0.0
    waited: float = 0.0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*SHARES, "rows"), 0.0))
    output_tokens: int = 0
    peak: int = 0
    preemptions: int = 0
    recomputed: int = 0
    moved: int = 0

    def run(self) -> Simulation:
        queue = [Row(*request) for request in self.requests]
        running: list[Row] = []
        memory = Memory(self.slots, self.policy, self.max_len, self.use_rest)
        self.free = self.slots // self.block_size if self.block_size else 0
        kept = int(self.head_room * self.free)
        while queue or running:
            joined = []
            while queue and queue[0].arrival <= self.seconds:
                row = self.head(queue)
                tokens = row.cached if row.swapped else row.prompt + row.generated
                if self.block_size:
                    needed = -(-tokens // self.block_size)
                    if needed > self.free - (kept if running else 0):
                        break
                    self.free -= needed
                    row.blocks = needed
                elif not memory.place(row):
                    break
                queue.remove(row)
                row.cached = tokens
                running.append(row)
                if row.swapped:
                    row.swapped = False
                    self.moved += tokens
                else:
                    joined.append(row)
            if not running:
                self.seconds = queue[0].arrival
                continue
            if joined:
                self.tick(running, queue, sum(row.cached for row in joined))
                steppers = joined
            else:
                if self.block_size:
                    self.grow(running, queue)
                for row in running:
                    row.cached += 1
                self.tick(running, queue, 0)
                steppers = running
            for row in list(steppers):
                row.generated += 1
                if row.generated == row.output:
                    running.remove(row)
                    self.output_tokens += row.output
                    self.free += row.blocks
                    if row.place:
                        memory.mark(row, False)
        return self

    def head(self, queue: list[Row]) -> Row:
        if queue[0].preempted or not self.shortest_first:
            return queue[0]
        arrived = [row for row in queue[:256] if row.arrival <= self.seconds]
        return min(arrived, key=lambda row: row.prompt)

    def grow(self, running: list[Row], queue: list[Row]) -> None:
        while True:
            takers = [row for row in running if row.cached % self.block_size == 0]
            if len(takers) <= self.free:
                break
            order = running[::-1]
            victim = order[0] if self.victim == "newest" else min(order, key=lambda r: r.cached)
            running.remove(victim)
            queue.insert(0, victim)
            self.free += victim.blocks
            self.preemptions += 1
            victim.preempted = True
            if self.swap_cost is None:
                self.recomputed += victim.cached
            else:
                victim.swapped = True
                self.moved += victim.cached
        for row in takers:
            self.free -= 1
            row.blocks += 1

    def tick(self, running: list[Row], queue: list[Row], prefill: int) -> None:
        live = sum(row.cached for row in running)
        duration = self.cost[0] + self.cost[1] * live + self.cost[2] * prefill
        if self.swap_cost is not None:
            duration += self.swap_cost * self.moved
            self.moved = 0
        self.peak = max(self.peak, len(running))
        if queue and queue[0].arrival <= self.seconds:
            reserved = internal = rounding = 0
            for row in running:
                if self.block_size:
                    room = row.blocks * self.block_size
                    will = min(room, row.final) - row.cached
                    reserved, internal = reserved + will, internal + room - row.cached - will
                else:
                    _, asked, granted = row.place
                    reserved += row.final - row.cached
                    internal += asked - row.final
                    rounding += granted - asked
            external = self.slots - live - reserved - internal - rounding
            values = (live, reserved, internal, rounding, external, len(running))
            for name, value in zip(self.sums, values, strict=True):
                self.sums[name] += value * duration
            self.waited += duration
        self.seconds += duration

    def shares(self) -> dict[str, float]:
        return {name: 100 * self.sums[name] / self.slots / self.waited for name in SHARES}

    @property
    def mean_batch(self) -> float:
        return self.sums["rows"] / self.waited

    @property
    def throughput(self) -> float:
        return self.output_tokens / self.seconds
