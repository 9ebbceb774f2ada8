"""Requests that begin with the same tokens: `Family`.

Read first: request.py. Read next: blocks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pykvcache.batch import Int64Array

if TYPE_CHECKING:
    from pykvcache.engine.request import Request


class PromptKey:
    """A prompt and a salt, compared by value. It keeps no copy of the prompt."""

    __slots__ = ("_hash", "prompt", "salt")

    def __init__(self, prompt: Int64Array, salt: int) -> None:
        self.prompt, self.salt = prompt, salt
        self._hash = hash((salt, prompt.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PromptKey) and (
            self.salt == other.salt and np.array_equal(self.prompt, other.prompt)
        )


@dataclass(eq=False)
class Family:
    """Requests with a common beginning: one computes it, the others go on from its blocks.

    The blocks are held once, however many wait for them, and as long as somebody does.

    Attributes:
        key: by which equal prompts find each other; None: nobody else joins.
        length: tokens of the beginning.
        leader: computes it now, the others wait for that.
        fresh: members that wait and have no token after the prompt, by order.
        heirs: members that wait and have, by order.
        running: members that have a lane.
        seq: handle of the blocks of the beginning, kept for the heirs; None: there are none.
        rank: key and order of the member that computed them.
    """

    key: PromptKey | None
    length: int
    leader: Request | None = None
    fresh: dict[int, Request] = field(default_factory=dict)
    heirs: dict[int, Request] = field(default_factory=dict)
    running: int = 0
    seq: int | None = None
    rank: tuple[int, int] = (0, 0)
