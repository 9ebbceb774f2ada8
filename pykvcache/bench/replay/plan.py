"""A replay as a user asks for it: checked, with everything that has a default filled in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pykvcache.bench.replay.cases import BLOCK_SIZES, BUDDIES, PAGED, Case, choose_cases, run_case
from pykvcache.bench.replay.configs import ModelConfig, load_config
from pykvcache.bench.replay.cost import StepCost
from pykvcache.bench.replay.rules import Rules
from pykvcache.bench.replay.totals import Result
from pykvcache.bench.replay.workload import Survey, Workload
from pykvcache.sizes import parse_memory

ORDER_WORDS = {"fcfs": "first come", "shortest": "shortest prompt"}
MOST_SLOTS = 2**27  # an allocator with a block for each takes some gigabytes
MEMORY, MODEL = "8GiB", "llama-3.1-8b"


@dataclass(frozen=True)
class Budget:
    """Token slots, and where the number comes from."""

    slots: int
    memory: int | None = None
    config: ModelConfig | None = None

    @classmethod
    def of(cls, memory: str | None, model_config: str | None, tokens: int | None) -> Budget:
        """From `tokens`, or from memory (default MEMORY) and a config (default MODEL).

        Raises:
            ValueError: both were given, either cannot be read, or there is no room for a token.
        """
        if model_config == "":
            raise ValueError("model config must be a name or a file, got ''")
        config = load_config(MODEL if model_config is None else model_config)
        if tokens is not None:
            if memory is not None:
                raise ValueError("give the budget as memory or as tokens, not both")
            if not 1 <= tokens <= MOST_SLOTS:
                raise ValueError(f"tokens must be 1 to {MOST_SLOTS}, got {tokens}")
            return cls(tokens)
        size = parse_memory(MEMORY if memory is None else memory)
        assert size is not None
        slots = size // config.token_bytes
        if slots < 1:
            raise ValueError(
                f"memory of {size} bytes has no room for a token of {config.name}, which takes "
                f"{config.token_bytes} bytes"
            )
        if slots > MOST_SLOTS:
            raise ValueError(
                f"memory of {size} bytes has {slots} tokens of {config.name}, more than the "
                f"{MOST_SLOTS} that can be replayed"
            )
        return cls(slots, size, config)

    def describe(self) -> str:
        if self.config is None or self.memory is None:
            return f"{self.slots:,} token slots"
        return (
            f"{self.slots:,} token slots ({self.memory / 2**30:.3g} GiB of {self.config.name}, "
            f"{self.config.token_bytes / 2**10:.4g} KiB a token)"
        )


@dataclass(frozen=True)
class Plan:
    """Everything that decides the figures of a replay."""

    workload: Workload
    survey: Survey
    budget: Budget
    max_len: int
    rules: Rules = field(default_factory=Rules)
    cases: Sequence[Case] = ()

    @classmethod
    def of(
        cls,
        workload: Workload,
        budget: Budget,
        rules: Rules,
        policies: Sequence[str] = (),
        block_sizes: Sequence[int] = (),
    ) -> Plan:
        """Read the trace once, and check everything against it.

        Without `workload.max_len` it is the longest request, or the budget if that is less.

        Raises:
            ValueError: one line that names the argument and the numbers.
        """
        fitting = [size for size in BLOCK_SIZES if size <= budget.slots]
        cases = choose_cases(policies, block_sizes or fitting)
        if rules.scheduler == "engine" and importlib.util.find_spec("transformers") is None:
            raise ValueError("scheduler engine needs transformers: pip install 'pykvcache[hf]'")
        max_len = workload.max_len
        if max_len is not None and not 2 <= max_len <= budget.slots:
            raise ValueError(f"max_len must be 2 to the {budget.slots} token slots, got {max_len}")
        if workload.limit is not None and workload.limit < 1:
            raise ValueError(f"requests must be at least 1, got {workload.limit}")
        for case in cases:
            if case.block_size is not None and case.block_size > budget.slots:
                raise ValueError(
                    f"block_size {case.block_size} is more than the {budget.slots} token slots"
                )
        workload = replace(workload, ordered=not rules.saturated)
        survey = Survey.of(workload)
        if max_len is None:
            max_len = min(survey.longest, max(2, budget.slots))
            workload = replace(workload, max_len=max_len)
            survey = Survey.of(workload) if survey.longest > max_len else survey
        if not rules.saturated and not survey.has_arrivals:
            raise ValueError(
                f"trace {workload.trace} does not say when requests arrive; replay it saturated"
            )
        if rules.prefix_cache and not survey.has_prefixes:
            raise ValueError(f"trace {workload.trace} does not say which prefixes are shared")
        return cls(workload, survey, budget, max_len, rules, cases)

    def run(self, advance: Callable[..., object] = lambda *a, **k: None) -> Iterator[Result]:
        """Replay case by case. `advance(count, title=label)` hears of every finished request."""
        for case in self.cases:

            def report(count: int, label: str = case.label) -> None:
                advance(count, title=label)

            yield run_case(case, self.workload, self.budget.slots, self.max_len, self.rules, report)

    def describe(self) -> list[str]:
        """Lines that say what the figures are of."""
        survey, rules, cost = self.survey, self.rules, self.rules.cost
        name = Path(self.workload.trace).name
        cut = f", {counted(survey.cut, 'request')} cut to it" if survey.cut else ""
        arrivals = "all requests waiting" if rules.saturated else "arrivals of the trace"
        return [
            f"{name}: {counted(survey.count, 'request')}, mean {survey.prompt:,.0f} tokens in and "
            f"{survey.output:,.0f} out, longest {survey.longest:,}; {arrivals}",
            f"{self.budget.describe()}; max-len {self.max_len:,}{cut}",
            f"{describe_cost(cost)}; {ORDER_WORDS[rules.order]} first{self._describe_order()}",
            *self._describe_rest(),
            *self._describe_engine(),
        ]

    def _describe_order(self) -> str:
        """What loop.py does, for the policies that it runs."""
        rules, is_paged = self.rules, any(case.policy == PAGED for case in self.cases)
        if is_paged and rules.scheduler == "engine":
            others = any(case.policy != PAGED for case in self.cases)
            return ", prefill first (not paged)" if others else ""
        if not is_paged:
            return ", prefill first"
        swaps = f" and {1e6 * rules.cost.per_swapped_token:.4g} us a token one way"
        return (
            f", prefill first, {rules.victim} preempted ({rules.preemption}"
            f"{swaps if rules.preemption == 'swap' else ''}), "
            f"head-room {100 * rules.head_room:.3g} %"
        )

    def _describe_rest(self) -> list[str]:
        slots = self.budget.slots
        rest = slots % (1 << min((self.max_len - 1).bit_length(), slots.bit_length() - 1))
        if not rest or not any(case.policy in BUDDIES for case in self.cases):
            return []
        if rest >= self.max_len or self.rules.buddy_rest == "used":
            fate = "used in smaller regions" + (" (buddy-rest used)" if rest < self.max_len else "")
        else:
            fate = "shorter than max-len and counts as lost (buddy-rest lost)"
        return [f"buddies: the rest of {rest:,} slots behind the largest regions is {fate}"]

    def _describe_engine(self) -> list[str]:
        rules = self.rules
        if rules.scheduler != "engine" or all(case.policy != PAGED for case in self.cases):
            return []
        prefixes = "prefixes shared" if rules.prefix_cache else "no prefixes shared"
        return [
            f"paged by the engine's scheduler: chunks beside decodes, {rules.token_budget:,} "
            f"tokens a step, {rules.max_running:,} rows at most, cheapest preempted, "
            f"head-room {100 * rules.head_room:.3g} %, {prefixes}"
        ]


def counted(count: int, noun: str) -> str:
    """ "1 request", "2,000 requests"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe_cost(cost: StepCost) -> str:
    """The cost of a step in words."""
    return (
        f"step: {1e3 * cost.base:.4g} ms + {1e9 * cost.per_kv_token:.4g} ns a cached token + "
        f"{1e6 * cost.per_prefill_token:.4g} us a prefill token"
    )
