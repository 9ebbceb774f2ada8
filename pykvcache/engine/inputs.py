"""What callers of an engine may give: prompts, settings and requests, checked before anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pykvcache.batch import Int64Array
from pykvcache.engine.request import Request
from pykvcache.engine.sampling import Sampling, parse_int

Prompt = Sequence[int] | Int64Array | Tensor
MAX_PRIORITY = 10**9


def parse_settings(
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] | None,
    max_new_tokens: int | None,
) -> list[Sampling]:
    """One `Sampling` a prompt; arguments as `Engine.generate`."""
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts must be a list of token ids each, got {prompts!r:.60}")
    if max_new_tokens is not None:
        if sampling is not None:
            raise ValueError("give sampling or max_new_tokens, not both")
        sampling = Sampling(max_new_tokens=max_new_tokens)
    if sampling is None:
        sampling = Sampling()
    if isinstance(sampling, Sampling):
        return [sampling] * len(prompts)
    if not isinstance(sampling, Sequence):
        raise TypeError(f"sampling must be a Sampling or a list of them, got {sampling!r}")
    settings = list(sampling)
    for setting in settings:
        if not isinstance(setting, Sampling):
            raise TypeError(f"sampling must be a Sampling or a list of them, got {setting!r}")
    if len(settings) != len(prompts):
        raise ValueError(f"sampling has {len(settings)} entries for {len(prompts)} prompts")
    return settings


@dataclass(frozen=True)
class Inputs:
    """Checks what comes in against one model.

    vocabulary: number of token ids at present. max_length: positions of the model, and whose they
    are.
    """

    vocabulary: Callable[[], int]
    max_length: tuple[int, str] | None

    def token_ids(self, prompt: Prompt, name: str) -> Int64Array:
        """Token ids as an array of its own."""
        if isinstance(prompt, (str, bytes)):
            raise TypeError(f"{name} must be token ids, got a string; use your tokenizer first")
        try:
            array = np.asarray(prompt.detach().cpu() if isinstance(prompt, Tensor) else prompt)
        except (ValueError, TypeError, RuntimeError):
            given = " ".join(repr(prompt).split())  # that of a tensor has lines
            raise TypeError(f"{name} must be a list of token ids, got {given:.60}") from None
        if array.ndim != 1 or array.size == 0:
            raise ValueError(
                f"{name} must be a non-empty list of token ids, got shape {list(array.shape)}"
            )
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        low, high, last = int(array.min()), int(array.max()), self.vocabulary() - 1
        if low < 0 or high > last:
            raise ValueError(f"{name} must be 0 to {last}, got {low if low < 0 else high}")
        return array.astype(np.int64)

    def check_stop(self, setting: Sampling) -> None:
        """Raise ValueError for a stop sequence that no text can have."""
        for stop in setting.stop_sequences:
            if max(stop) > (last := self.vocabulary() - 1):
                raise ValueError(f"stop must be 0 to {last}, got {max(stop)}")

    def request(self, prompt: Int64Array, new_tokens: int, priority: int, salt: int) -> Request:
        """A request that is not in the queue yet."""
        for name, value in (("priority", priority), ("salt", salt)):
            parse_int(name, value)
        priority, salt = int(priority), int(salt)
        if abs(priority) > MAX_PRIORITY:
            raise ValueError(f"priority must be within {MAX_PRIORITY:,} of 0, got {priority}")
        if not -(2**63) <= salt < 2**63:
            raise ValueError(f"salt must fit 64 bits, got {salt}")
        limit = len(prompt) + new_tokens
        if self.max_length is not None and limit - 1 > self.max_length[0]:
            raise ValueError(
                f"a request of {len(prompt)} prompt tokens, {limit} with its output, is longer "
                f"than the {self.max_length[0]} positions of {self.max_length[1]}"
            )
        return Request(prompt, limit, key=0, order=0, salt=salt, priority=priority)
