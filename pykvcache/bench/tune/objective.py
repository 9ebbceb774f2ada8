"""What tuning maximises: generated tokens a second of the trace, replayed with measured costs.

    tokens/s = output / (steps * base + kv * layers * decode + prefill * layers * attention)

steps, kv (cached tokens read, summed over steps), prefill (prompt tokens computed, again after
preemption) and output are counted by replaying the trace with the real allocator in blocks of the
candidate's size (pykvcache/bench/replay); with all requests waiting they do not depend on time.
base is what a step costs whatever the block size: reading the weights once. decode is the measured
time of a layer's attention for one cached token, attention that of a prompt token. The arithmetic
of the weights on prompts is the same for every choice and left out, so the figure compares
candidates and does not predict a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.totals import Result


@dataclass(frozen=True)
class Demand:
    """What a replay with one block size counted.

    live: percent of the memory. waste: percent of the allocated slots. Both, and mean_batch, are
    averages over the whole replay, also while nobody waits: a size whose blocks leave no request
    waiting is compared with one that keeps them waiting.
    """

    block_size: int
    steps: float
    kv_tokens: float
    prefill_tokens: float
    output_tokens: int
    live: float
    waste: float
    mean_batch: float

    @classmethod
    def of(cls, result: Result, cost: StepCost) -> Demand:
        """Counts from a replay with `cost`, of which no part may be 0."""
        assert result.block_size is not None
        seconds = result.seconds
        window = result.waiting + result.calm
        memory = result.slots * window.seconds
        return cls(
            result.block_size,
            seconds.base / cost.base,
            seconds.kv / cost.per_kv_token,
            seconds.prefill / cost.per_prefill_token,
            result.output_tokens,
            100 * window.live / memory if memory else 0.0,
            100 * (1 - window.live / window.allocated) if window.allocated else 0.0,
            window.rows / window.seconds if window.seconds else 0.0,
        )


@dataclass(frozen=True)
class Objective:
    """Tokens a second of a block size, given what its kernels cost.

    base: seconds of a step. layers: of the model. demands: by block size.
    prefill: seconds of a layer's attention for a prompt token, by block size.
    """

    base: float
    layers: int
    demands: Mapping[int, Demand]
    prefill: Mapping[int, float]

    def parts(self, block_size: int, decode: float) -> tuple[float, float, float]:
        """Seconds of base, decode and prefill over the whole trace.

        decode: seconds of a layer's attention for one cached token.
        """
        demand = self.demands[block_size]
        return (
            demand.steps * self.base,
            demand.kv_tokens * self.layers * decode,
            demand.prefill_tokens * self.layers * self.prefill[block_size],
        )

    def value(self, block_size: int, decode: float) -> float:
        """Generated tokens a second."""
        return self.demands[block_size].output_tokens / sum(self.parts(block_size, decode))

    def waste(self, block_size: int) -> float:
        return self.demands[block_size].waste
