"""What users ask of a request, `Sampling`, and what they get back, `Output`, `Event` and `Score`.

Read next: scheduler.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

LogProbs = dict[int, float]  # token id -> natural log of its probability
COLDEST = 1e-30  # logits over a smaller temperature overflow float32


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, and when it ends.

    Greedy unless one of temperature, top_p, top_k and min_p is given. The processors are those of
    transformers, in the order in which `generate` applies them.

    Args:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 to 1e-30 = greedy, default 1 when another filter is
            given.
        top_p, top_k, min_p: filters, see the warpers of transformers.
        repetition_penalty: above 1 makes tokens of prompt and output less likely; default: that of
            the model's generation config.
        min_new_tokens: no end-of-text token before so many; default: that of the model's generation
            config.
        seed: makes the tokens a function of the logits and the seed alone, whatever else runs; in
            less than float32 the rounding of logits depends on how many rows a step has.
        n: samples of the prompt, which is computed once.
        stop: token ids, or lists of token ids, that end the output; they stay part of it.
            None = nothing does.
        ignore_eos: go on after the model's end-of-text tokens.
        logprobs: report the log-probabilities of so many most likely tokens besides the chosen
            one, of the model's own distribution (before any processor); 0 = the chosen one only,
            None = nothing.
        processors: further callables (input_ids [1, length], scores [1, vocabulary]) -> scores,
            applied to each row between the penalty and the filters, as `generate` does. Where all
            of them are classes of transformers that keep no state, rows share a call. One that
            raises ends its request with the finish reason "error".

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    seed: int | None = None
    n: int = 1
    stop: Sequence[int | Sequence[int]] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    processors: Sequence[Callable[[Any, Any], Any]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        for name, least in (
            ("max_new_tokens", 1),
            ("n", 1),
            ("min_new_tokens", 0),
            ("top_k", 1),
            ("logprobs", 0),
            ("seed", None),
        ):
            value = getattr(self, name)
            if value is None and name not in ("max_new_tokens", "n"):
                continue
            value = parse_int(name, value)
            object.__setattr__(self, name, value)
            if least is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} but max_new_tokens {self.max_new_tokens}"
            )
        for name, low, high in (
            ("temperature", 0.0, 1e6),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-6, 1e6),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            value = float(value)
            object.__setattr__(self, name, value)
            if not low <= value <= high:
                raise ValueError(f"{name} must be {low:g} to {high:g}, got {value}")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0, got 0")
        stop = () if self.stop is None else self.stop
        _check_list("stop", stop)
        _check_list("processors", self.processors)
        for processor in self.processors:
            if not callable(processor):
                raise TypeError(f"processors must be callable, got {processor!r}")
        object.__setattr__(self, "stop", tuple(_stop_sequence(entry) for entry in stop))
        object.__setattr__(self, "processors", tuple(self.processors))

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        """`stop`, every entry as a sequence."""
        return self.stop  # type: ignore[return-value]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        if self.temperature is not None:
            return self.temperature <= COLDEST
        return self.top_p is None and self.top_k is None and self.min_p is None


def _check_list(name: str, value: Any) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r}")


def parse_int(name: str, value: Any) -> int:
    """An int, from one of numpy, too.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def _stop_sequence(entry: Any) -> tuple[int, ...]:
    tokens = (entry,) if isinstance(entry, Integral) else entry
    whole = isinstance(tokens, (list, tuple)) and all(
        isinstance(token, Integral) and not isinstance(token, bool) for token in tokens
    )
    if not whole:
        raise TypeError(f"stop must hold token ids or lists of them, got {entry!r}")
    tokens = tuple(map(int, tokens))
    if not tokens:
        raise ValueError("stop must not hold an empty list")
    if min(tokens) < 0:
        raise ValueError(f"stop must hold token ids of at least 0, got {entry!r}")
    return tokens


@dataclass
class Output:
    """One finished sample of one prompt.

    Attributes:
        prompt_index: position of the prompt in what was given to `generate`.
        sample_index: 0 to n - 1.
        token_ids: generated tokens; the one that ended the output included.
        logprobs: per token, the asked-for log-probabilities, the chosen token's among them;
            None when none were asked for.
        finish_reason: "eos", "stop", "length", "cancelled" or "error".
        prompt_tokens: length of the prompt.
        cached_tokens: prompt tokens whose keys and values were not computed for this output but
            found in the pool.
        preemptions: how often its blocks were taken away.
        queued, first_token, total: seconds from submit to the first step, to the first token, to
            the end.
        error: what a processor of the request raised, or None.
    """

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[LogProbs] | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    preemptions: int = 0
    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0
    error: Exception | None = None


@dataclass(frozen=True)
class Event:
    """One token as it comes, from `Engine.stream`.

    `output` is set on the last event of a sample; that of a cancelled one has no token.
    """

    prompt_index: int
    sample_index: int
    token_id: int | None
    logprobs: LogProbs | None = None
    output: Output | None = None


@dataclass
class Score:
    """Log-probabilities of one completion, from `Engine.score`.

    Attributes:
        logprobs: per completion token, natural log of its probability.
        top: per completion token, the most likely tokens with theirs, likeliest first.
    """

    logprobs: list[float]
    top: list[LogProbs] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Log-probability of the whole completion."""
        return sum(self.logprobs)
