"""Reads request traces: how long prompts and outputs were, and when they arrived.

Four public traces are packaged (`traces/README.md` has their sources and licences). A CSV file has
one of the pairs of columns in CSV_COLUMNS, a JSON-lines file (`.jsonl`, `.jsonl.gz`) the keys
`input_length` and `output_length`, and `hash_ids` if prefixes are to be replayed. Files are
streamed, so a trace of any length takes no memory.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

FOLDER = Path(__file__).parent / "traces"
TRACES = {
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "mooncake-conv": "mooncake_conversation_trace.jsonl.gz",
    "sharegpt": "sharegpt_8k_lengths.csv",
}
CSV_COLUMNS = (
    ("ContextTokens", "GeneratedTokens"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("input_length", "output_length"),
)


@dataclass(frozen=True)
class Request:
    """One request of a trace, in tokens."""

    prompt: int
    output: int


def read_trace(trace: str | Path) -> Iterator[Request]:
    """Stream the requests of a packaged trace (a name in TRACES) or of a file.

    Raises:
        ValueError: the name is unknown, a column is missing, or a row is no pair of counts; the
            message has the file and the line number.
    """
    path = _find(trace)
    with _open_text(path) as lines:
        rows = _csv_rows(path, lines) if ".csv" in path.suffixes else _json_rows(path, lines)
        for line_number, prompt, output in rows:
            yield Request(
                _count(prompt, "prompt", path, line_number),
                _count(output, "output", path, line_number),
            )


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
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path.name}, line {line_number}: must be a JSON object with hash_ids, a list "
                    f"of integers ({type(error).__name__}: {error})"
                ) from None
            yield ids


def _find(trace: str | Path) -> Path:
    path = FOLDER / TRACES[trace] if trace in TRACES else Path(trace)
    if not path.is_file():
        names = ", ".join(TRACES)
        raise ValueError(f"trace must be a file or one of {names}, got {str(trace)!r}")
    return path


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        yield file


def _csv_rows(path: Path, lines: TextIO) -> Iterator[tuple[int, Any, Any]]:
    reader = csv.DictReader(lines)
    present = reader.fieldnames or []
    for prompt, output in CSV_COLUMNS:
        if prompt in present and output in present:
            break
    else:
        wanted = " or ".join(",".join(pair) for pair in CSV_COLUMNS)
        raise ValueError(f"{path.name} must have the columns {wanted}, got {','.join(present)}")
    for row in reader:
        yield reader.line_num, row[prompt], row[output]


def _json_rows(path: Path, lines: TextIO) -> Iterator[tuple[int, Any, Any]]:
    for line_number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield line_number, row["input_length"], row["output_length"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path.name}, line {line_number}: must be a JSON object with input_length and "
                f"output_length ({type(error).__name__}: {error})"
            ) from None


def _count(value: Any, what: str, path: Path, line_number: int) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError):
        count = -1
    if count < 0:
        raise ValueError(
            f"{path.name}, line {line_number}: {what} tokens must be a count, got {value!r}"
        )
    return count
