"""Counts of what the drop-in did in this process, to see whether a model runs on its fast path.

`paged` attention calls read blocks; `gathered` handles were turned into dense K or V because code
other than our attention touched them; `masks` were built densely although they started lazy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Process-wide counts since the last `reset()`; not synchronised between threads."""

    paged: int = 0
    gathered: int = 0
    masks: int = 0

    def reset(self) -> None:
        """Set every count to 0."""
        self.paged = self.gathered = self.masks = 0

    def snapshot(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


counters = Counters()
