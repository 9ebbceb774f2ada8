"""What a step of the model costs: the one assumption behind every throughput of a replay."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step, linear in what it reads and computes.

    The defaults are an 8B model with grouped heads on an H100: reading the weights takes 6 ms,
    reading one cached token 45 ns (128 KiB at 2.9 TB/s), computing one prompt token 45 us.
    """

    base: float = 6e-3
    """Seconds of a step that does nothing else."""
    per_kv_token: float = 45e-9
    """Seconds for each token in the cache that the step reads."""
    per_prefill_token: float = 45e-6
    """Seconds for each prompt token that the step computes."""
    per_swapped_token: float = 5.2e-6
    """Seconds to move a token to or from host memory (128 KiB at 25 GB/s), if rows are swapped."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} must be a time of 0 or more, got {value}")
        if self.base == 0:
            raise ValueError(
                "base must be more than 0: a step that takes no time has no throughput"
            )
