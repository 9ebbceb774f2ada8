"""Amounts of memory, as users write them."""

from __future__ import annotations

import re
from numbers import Integral

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_memory(memory: int | str | None, name: str = "memory") -> int | None:
    """Bytes of "4GiB", "512 MB" or a plain int; `name` is what errors call it.

    Raises:
        ValueError: not an amount. TypeError: neither a string nor an int.
    """
    if memory is None:
        return None
    if isinstance(memory, Integral) and not isinstance(memory, bool):
        return int(memory)
    if not isinstance(memory, str):
        raise TypeError(f"{name} must be bytes as an int or a string like '4GiB', got {memory!r}")
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?i?B?)\s*", memory)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{name} must look like '4GiB' or '512MB', got {memory!r}")
    return int(float(match[1]) * _UNITS[match[2]])
