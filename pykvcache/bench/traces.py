"""Reads request traces: how long prompts and outputs were, and when they arrived.

Four public traces are packaged (`traces/README.md` has their sources and licences). A CSV file
(`.csv`, `.csv.gz`) has one of the pairs of columns in LENGTHS, a JSON-lines file (`.jsonl`,
`.jsonl.gz`) one of these pairs of keys. Either may say when requests arrived, by
one of ARRIVALS, and what prompts have in common, by `hash_ids`. Files are streamed, so a trace of
any length takes no memory.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TextIO, TypeAlias

FOLDER = Path(__file__).parent / "traces"
TRACES = {
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "mooncake-conv": "mooncake_conversation_trace.jsonl.gz",
    "sharegpt": "sharegpt_8k_lengths.csv",
}
PREFIX_BLOCK = 512
MOST_TOKENS = 10**9  # of a prompt or an answer
LENGTHS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("input_length", "output_length"),
    ("Request tokens", "Response tokens"),
)


NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class Request:
    """One request of a trace: tokens, and seconds on the trace's own clock (None: not known).

    prefix: ids of the first blocks of PREFIX_BLOCK prompt tokens; equal ids are equal contents.
    """

    prompt: int
    output: int
    arrival: float | None = None
    prefix: tuple[int, ...] = ()


def _seconds_of_date(text: str) -> float:
    """Seconds of "2023-11-16 18:17:03.9799600", with or without fraction and time zone."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d[ T][\d:]{8})(\.\d+)?(?:Z|([+-])(\d\d):(\d\d))?", text)
    if match is None:
        raise ValueError(f"not a date and time: {text!r}")
    east = timedelta(hours=int(match[4] or 0), minutes=int(match[5] or 0))
    zone = timezone(-east if match[3] == "-" else east)
    date = datetime.fromisoformat(match[1]).replace(tzinfo=zone)
    return date.timestamp() + float(match[2] or 0)


def _number(value: Any) -> float:
    """A number, or text of one in digits and a point; float() alone reads more."""
    if isinstance(value, bool) or (isinstance(value, str) and not NUMBER.fullmatch(value)):
        raise ValueError(f"not a number: {value!r}")
    return float(value)


Row: TypeAlias = "tuple[str, Any, Any, Mapping[str, Any]]"
"""Where it stands (for messages), prompt, output, and all that the line has."""

ARRIVALS: dict[str, Callable[[Any], float]] = {
    "arrival": _number,
    "arrived_at": _number,
    "Timestamp": _number,
    "timestamp": lambda value: _number(value) / 1000,
    "TIMESTAMP": _seconds_of_date,
}
"""Columns and keys with the time of arrival: seconds (also Vidur's and BurstGPT's), milliseconds
(Mooncake), a date and time (Azure)."""


def read_trace(trace: str | Path, ordered: bool = False) -> Iterator[Request]:
    """Stream the requests of a packaged trace (a name in TRACES) or of a file.

    ordered: a request that arrives before the one in front, or does not say when, is an error.

    Raises:
        ValueError: the name is unknown, a column is missing, or a row is no pair of counts; the
            message has the file and the line number.
    """
    path = _find(trace)
    try:
        yield from _read_file(path, ordered)
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}, line {_undecodable(path)}: not UTF-8") from None
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def _read_file(path: Path, ordered: bool) -> Iterator[Request]:
    reader = READERS.get(_kind(path))
    if reader is None:
        raise ValueError(f"a trace must end in {', '.join(READERS)}, or .gz after it: {path.name}")
    latest = -math.inf
    with _open_text(path) as lines:
        for where, prompt, output, row in reader(path, lines):
            arrival = _arrival(row, where)
            if ordered:
                if arrival is None:
                    names = ", ".join(ARRIVALS)
                    raise ValueError(f"{where}: does not say when it arrives, by one of {names}")
                if arrival < latest:
                    raise ValueError(
                        f"{where}: arrives {latest - arrival:.6g} s before the one above"
                    )
                latest = arrival
            yield Request(
                _count(prompt, "prompt", where),
                _count(output, "output", where),
                arrival,
                _prefix(row, where),
            )


def _kind(path: Path) -> str:
    """The suffix that says how a file reads, ".csv" of a.CSV.gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _undecodable(path: Path) -> int:
    """The number of the first line that is no UTF-8."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return int(number)
    return 0


def read_prefix_blocks(trace: str | Path) -> Iterator[list[int]]:
    """Stream the `hash_ids` of a JSON-lines trace: an id for each block of every prompt.

    An equal id is the same block after the same prefix.

    Raises:
        ValueError: there is no such trace, or a row has no such ids.
    """
    path = _find(trace)
    with _open_text(path) as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                ids = json.loads(line)["hash_ids"]
                if not all(type(block) is int for block in ids):
                    raise TypeError(f"got {ids}")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path.name}, line {line_number}: must be a JSON object with hash_ids, a list "
                    f"of integers ({type(error).__name__}: {error})"
                ) from None
            yield ids


class Numbers(dict[int, int]):
    """Small numbers for ids of any size, in the order in which they are asked for."""

    def __missing__(self, key: int) -> int:
        self[key] = number = len(self)
        return number


def _find(trace: str | Path) -> Path:
    path = FOLDER / TRACES[trace] if trace in TRACES else Path(trace)
    if not path.is_file():
        names = ", ".join(TRACES)
        raise ValueError(f"trace must be a file or one of {names}, got {str(trace)!r}")
    return path


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield file


def _csv_rows(path: Path, lines: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(lines)
    present = reader.fieldnames or []
    pair = _lengths_in(present)
    if pair is None:
        raise ValueError(f"{path.name} must have the columns {_wanted()}, got {','.join(present)}")
    prompt, output = pair
    for name in (prompt, output, *ARRIVALS, "hash_ids"):
        if (times := present.count(name)) > 1:
            raise ValueError(f"{path.name}, line 1: column {name} is there {times} times")
    for row in reader:
        yield f"{path.name}, line {reader.line_num}", row[prompt], row[output], row


def _json_rows(path: Path, lines: TextIO) -> Iterator[Row]:
    for line_number, line in enumerate(lines, start=1):
        where = f"{path.name}, line {line_number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: must be a JSON object ({type(error).__name__}: {error})"
            ) from None
        pair = _lengths_in(row) if isinstance(row, dict) else None
        if pair is None:
            got = f"{line.strip():.60}"
            raise ValueError(f"{where}: must be a JSON object with {_wanted()}, got {got}")
        yield where, row[pair[0]], row[pair[1]], row


def _lengths_in(names: Collection[str]) -> tuple[str, str] | None:
    """The pair of LENGTHS that is there."""
    return next((pair for pair in LENGTHS if pair[0] in names and pair[1] in names), None)


def _wanted() -> str:
    return " or ".join(",".join(pair) for pair in LENGTHS)


READERS = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}


def _arrival(row: Mapping[str, Any], where: str) -> float | None:
    for name, seconds_of in ARRIVALS.items():
        if name in row:
            try:
                seconds = seconds_of(row[name])
            except (TypeError, ValueError, OverflowError):
                seconds = math.nan
            if not math.isfinite(seconds):
                raise ValueError(f"{where}: {name} must be a time, got {row[name]!r}")
            return seconds
    return None


def _prefix(row: Mapping[str, Any], where: str) -> tuple[int, ...]:
    ids = row.get("hash_ids") or ()
    if isinstance(ids, str):  # a CSV cell
        ids = ids.split()
    try:
        if any(isinstance(value, (float, bool)) for value in ids):
            raise TypeError
        if any(isinstance(value, str) and not NUMBER.fullmatch(value) for value in ids):
            raise ValueError
        return tuple(int(value) for value in ids)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: hash_ids must be integers, got {ids!r}") from None


def _count(value: Any, what: str, where: str) -> int:
    try:
        number = _number(value)
        count = int(number) if number % 1 == 0 and number <= MOST_TOKENS else -1
    except (TypeError, ValueError, OverflowError):
        count = -1
    if count < 0:
        raise ValueError(
            f"{where}: {what} tokens must be a count up to {MOST_TOKENS:,}, got {value!r:.40}"
        )
    return count
