"""Configurations that name another attention for as long as somebody runs a forward with it.

Engines lend the packed attention to a model for each forward; `patch` and `unpatch`, which note and
set the model's own, wait until nobody does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Loan:
    """A configuration, the name it had, and the threads that need the other."""

    config: Any
    before: str | None
    threads: set[int] = field(default_factory=set)


_loans: dict[int, _Loan] = {}  # by id of the configuration
_changed = threading.Condition()  # guards _loans


@contextlib.contextmanager
def lent(config: Any, name: str, eager_name: str, eager: frozenset[str]) -> Iterator[bool]:
    """Let `config` name an implementation inside a with block; yields whether it is the eager one.

    That is `eager_name`, taken if the configuration's own is in `eager`, else `name`. Several
    threads may do so at once; the last to leave sets the configuration's own again.
    """
    thread = threading.get_ident()
    try:
        yield _take(config, thread, name, eager_name, eager)
    finally:
        _give_back(config, thread)


def _take(config: Any, thread: int, name: str, eager_name: str, eager: frozenset[str]) -> bool:
    with _changed:
        loan = _loans.get(id(config))
        if loan is None:
            loan = _loans[id(config)] = _Loan(config, config._attn_implementation_internal)
        loan.threads.add(thread)
        is_eager = loan.before in eager
        config._attn_implementation_internal = eager_name if is_eager else name
        return is_eager


def _give_back(config: Any, thread: int) -> None:
    with _changed:
        loan = _loans.get(id(config))
        if loan is None:
            return
        loan.threads.discard(thread)
        if not loan.threads:
            config._attn_implementation_internal = loan.before
            del _loans[id(config)]
            _changed.notify_all()


@contextlib.contextmanager
def not_lent(configs: list[Any]) -> Iterator[None]:
    """Wait for forwards of other threads that borrow one of these, and keep new ones waiting."""
    thread = threading.get_ident()
    with _changed:
        while any(_loans[id(c)].threads - {thread} for c in configs if id(c) in _loans):
            _changed.wait()
        yield
