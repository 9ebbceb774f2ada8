"""The launch table of this machine: which tiles, stages and splits kernels run with.

A table is a JSON object with a section a device: "cpu", or a GPU architecture ("sm_90", "gfx942").
A section has lists of entries, "decode" and "prefill"; the first entry that fits a call is taken,
and what no entry fits is left to the kernels and to kernels/launch/table.json. `python -m pykvcache
tune` writes such a table; docs/tuning.md describes the fields.

The user's table is the file that PYKVCACHE_LAUNCH_TABLE names ("none" = no table), or else
pykvcache/launch.json in the user's cache folder if there is one.

Read next: csrc/cpu/launches.h and kernels/launch/table.py.
"""

from __future__ import annotations

import json
import os
import warnings
from array import array
from pathlib import Path
from typing import Any

VARIABLE = "PYKVCACHE_LAUNCH_TABLE"
NO_TABLE = "none"
PHASES = ("decode", "prefill")
LIMITS = ("dim", "max_dim", "bytes", "max_bytes")
CHOICES = {"cpu": ("tile", "stages", "splits", "rows")}
GPU_CHOICES = ("tile", "stages", "warps", "rows")
GPU_NEEDS = ("tile", "stages", "warps")
MOST_DIM, MOST_BYTES = 576, 8

Table = dict[str, Any]


def user_path() -> Path:
    """The file in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "pykvcache" / "launch.json"


def user_table() -> Table:
    """The user's table, for kernels that are loaded; a broken one is left alone with a warning."""
    try:
        return find_user_table()[0]
    except ValueError as error:
        warnings.warn(f"no launch table is used: {error}", stacklevel=2)
        return {}


def find_user_table() -> tuple[Table, Path | None]:
    """The user's table and its file; ({}, None) when there is none.

    Raises:
        ValueError: the file is broken, or the one that VARIABLE names is missing.
    """
    named = os.environ.get(VARIABLE)
    if named == NO_TABLE:
        return {}, None
    if named:
        return read_table(named), Path(named)
    try:
        path = user_path()
        if not path.is_file():
            return {}, None
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return {}, None
    return read_table(path), path


def read_table(path: str | Path) -> Table:
    """A checked table.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    try:
        table = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"launch table {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"launch table {path} is no JSON: {error}") from None
    try:
        check_table(table)
    except ValueError as error:
        raise ValueError(f"launch table {path}: {error}") from None
    found: Table = table
    return found


def check_table(table: object) -> None:
    """Raise ValueError unless `table` has the form that this module describes."""
    if not isinstance(table, dict):
        raise ValueError(f"must be a JSON object, got {type(table).__name__}")
    for name, section in table.items():
        if name == "about":
            continue
        if not isinstance(section, dict):
            raise ValueError(f"section {name} must be an object")
        for phase in PHASES:
            for entry in section.get(phase, ()):
                _check_entry(f"{name}.{phase}", entry, name)


def _check_entry(where: str, entry: object, section: str) -> None:
    known = (*LIMITS, *CHOICES.get(section, GPU_CHOICES))
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a list of objects")
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{where} knows {', '.join(known)}, got {key!r}")
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")
    missing = () if section in CHOICES else [key for key in GPU_NEEDS if key not in entry]
    if missing:
        raise ValueError(f"{where} needs {', '.join(missing)}")


def fits(entry: dict[str, int], head_dim: int, element_bytes: int) -> bool:
    """Whether an entry serves K of this head dim and elements of this size."""
    return entry.get("dim", head_dim) == head_dim <= entry.get("max_dim", MOST_DIM) and entry.get(
        "bytes", element_bytes
    ) == element_bytes <= entry.get("max_bytes", MOST_BYTES)


def use_on_cpu(table: Table, cpu_name: str | None = None) -> bool:
    """Hand the "cpu" section to the CPU kernels; False when it was made on another processor.

    Raises:
        ValueError: a value is out of the kernels' range.
    """
    from pykvcache import _C

    section = table.get("cpu", {})
    device = section.get("device")
    is_other = device is not None and device != (cpu_name or processor())
    _C.set_launches(b"" if is_other else array("q", _integers(section)).tobytes())
    return not is_other


def _integers(section: Table) -> list[int]:
    """The entries as csrc/cpu/launches.h lays them out."""
    numbers = []
    for number, phase in enumerate(PHASES):
        for entry in section.get(phase, ()):
            dim, size = entry.get("dim"), entry.get("bytes")
            numbers += [number, dim or 1, dim or entry.get("max_dim", MOST_DIM)]
            numbers += [size or 1, size or entry.get("max_bytes", MOST_BYTES)]
            numbers += [entry.get(key, 0) for key in CHOICES["cpu"]]
    return numbers


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        with cpuinfo.open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def merge_tables(first: Table, second: Table) -> Table:
    """Entries of `first` before those of `second`, section by section; other keys are first's."""
    merged = dict(second)
    for name, section in first.items():
        other = second.get(name, {})
        if name == "about" or not other:
            merged[name] = section
            continue
        merged[name] = {**other, **section}
        for phase in PHASES:
            entries = list(section.get(phase, ()))
            known = [{key: entry.get(key) for key in LIMITS} for entry in entries]
            entries += [
                entry
                for entry in other.get(phase, ())
                if {key: entry.get(key) for key in LIMITS} not in known
            ]
            if entries:
                merged[name][phase] = entries
    return merged
