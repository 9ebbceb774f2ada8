"""Where the slots of a pool are, as `BlockAllocator.stats()` reports it."""

from __future__ import annotations

from dataclasses import dataclass

SHARES = ("live", "reserved", "internal", "rounding", "external")


@dataclass(frozen=True)
class PoolStats:
    """Counts of one moment; csrc/allocator/stats.h defines them.

    The first six count slots, times layers where groups have different numbers of layers. Five of
    them make up what is used or waited for, and `percent()` splits that; the sixth, `idle`, is free
    while nobody waits.
    """

    live: int
    """Tokens that can still be attended; one that several sequences share counts once."""
    reserved: int
    """Blocks taken ahead by reserve(), and pinned blocks that no sequence has."""
    internal: int
    """Slack in last blocks, and tokens out of the window in blocks that are still held."""
    rounding: int
    """Layers that a group has fewer than the largest group, whose tensors it shares."""
    external: int
    """Free blocks, while a request that needs more than them was refused and is not yet met."""
    idle: int
    """Free blocks otherwise."""

    num_blocks: int
    used_blocks: int
    peak_blocks: int
    table_entries: int
    table_blocks: int
    pinned_blocks: int
    sequences: int
    tokens: int
    copies: int
    """Blocks copied on write since the start."""
    forks: int
    refusals: int
    """Requests that raised OutOfBlocks."""
    steps: int
    block_steps: int
    """Sum of used_blocks after each append or step."""
    metadata_bytes: int
    group_blocks: tuple[int, ...]
    """Blocks that each group uses."""
    cached_blocks: int = 0
    """Free blocks that hold known prefixes; the shares count them as free."""
    prompt_tokens: int = 0
    """Tokens that allocate_cached() was asked for since the start."""
    hit_tokens: int = 0
    """Those of them that it found."""
    evictions: int = 0
    """Cached blocks that lost their content because blocks were needed."""
    merged_blocks: int = 0
    """Blocks given back because another one held the same tokens."""

    @property
    def sharing_factor(self) -> float:
        """Blocks that the sequences would need without sharing, over the blocks they have."""
        return self.table_entries / self.table_blocks if self.table_blocks else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were found."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def percent(self) -> dict[str, float]:
        """The five shares; they sum to exactly 100. A pool that nobody uses counts as 100 % live.

        Shares are multiples of 2**-20 %, which binary floats add without error.
        """
        unit = 2**20
        total = sum(getattr(self, name) for name in SHARES)
        parts = {name: 100 * unit * getattr(self, name) // max(total, 1) for name in SHARES[1:]}
        return {"live": 100 - sum(parts.values()) / unit} | {k: v / unit for k, v in parts.items()}
