"""The launch table of this machine: which tiles, stages and splits kernels run with.

A table is a JSON object with a section a device: "cpu", or a GPU architecture ("sm_90", "gfx942").
A section has lists of entries, "decode" and "prefill"; the first entry that fits a call is taken,
and what no entry fits, or one without parameters, is left to the kernels and to
kernels/launch/table.json. `python -m pykvcache
tune` writes such a table; docs/tuning.md describes the fields.

The user's table is the file that PYKVCACHE_LAUNCH_TABLE names ("none" = no table), or else
pykvcache/launch.json in the user's cache folder if there is one.

Read next: csrc/cpu/launches.h and kernels/launch/table.py.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

VARIABLE = "PYKVCACHE_LAUNCH_TABLE"
NO_TABLE = "none"
PHASES = ("decode", "prefill")
MOST_DIM, MOST_BYTES = 576, 8
Allowed = Mapping[str, Collection[int]]
LIMITS: Allowed = {
    "dim": range(1, MOST_DIM + 1),
    "max_dim": range(1, MOST_DIM + 1),
    "bytes": range(1, MOST_BYTES + 1),
    "max_bytes": range(1, MOST_BYTES + 1),
}
CPU_CHOICES: Allowed = {  # what csrc/cpu/launches.cpp takes
    "tile": (16, 32, 48, 64),
    "stages": range(1, 4),
    "splits": range(1, 65),
    "rows": range(1, 4097),
}
GPU_CHOICES: Allowed = {
    "tile": (16, 32, 64, 128, 256),
    "stages": range(1, 9),
    "warps": (1, 2, 4, 8, 16),
    "rows": (16, 32, 64, 128, 256),
}
GPU_NEEDS = ("tile", "stages", "warps")
GPU_NUMBERS: Allowed = {"programs": range(1, 65536), "programs_per_sm": range(1, 65)}
SECTION_NAME = re.compile(r"cpu|interpreter|sm_\d+|gfx\w+")

Table = dict[str, Any]


def user_path() -> Path:
    """The file in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "pykvcache" / "launch.json"


def use_user_table_on_cpu() -> None:
    """Hand the user's table to the CPU kernels; one that they refuse is left with a warning."""
    try:
        use_on_cpu(user_table())
    except (ValueError, OverflowError) as error:
        warnings.warn(f"no launch table is used: {error}", stacklevel=2)
        use_on_cpu({})


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
    except (ValueError, RecursionError) as error:
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
        if not SECTION_NAME.fullmatch(name):
            raise ValueError(f"sections are cpu, sm_N, gfxN and interpreter, got {name!r}")
        if not isinstance(section, dict):
            raise ValueError(f"section {name} must be an object")
        _check_section(name, section)


def _check_section(name: str, section: dict[str, Any]) -> None:
    choices, numbers = (CPU_CHOICES, {}) if name == "cpu" else (GPU_CHOICES, GPU_NUMBERS)
    for key, value in section.items():
        if key in PHASES:
            if not isinstance(value, list):
                raise ValueError(f"{name}.{key} must be a list of objects")
            for entry in value:
                _check_entry(f"{name}.{key}", entry, choices)
        elif key in numbers:
            _check_number(f"{name}.{key}", value, numbers[key])
        elif key != "device":
            known = ", ".join((*PHASES, *numbers, "device"))
            raise ValueError(f"section {name} knows {known}, got {key!r}")
        elif not isinstance(value, str):
            raise ValueError(f"{name}.device must be a processor's name, got {value!r}")


def _check_entry(where: str, entry: object, choices: Allowed) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a list of objects")
    known = {**LIMITS, **choices}
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{where} knows {', '.join(known)}, got {key!r}")
        _check_number(f"{where}: {key}", value, known[key])
    missing = () if choices is CPU_CHOICES else [key for key in GPU_NEEDS if key not in entry]
    if missing and any(key in choices for key in entry):
        raise ValueError(f"{where} needs {', '.join(missing)}")


def _check_number(where: str, value: object, allowed: Collection[int]) -> None:
    if type(value) is int and value in allowed:
        return
    if isinstance(allowed, range):
        words = f"an integer from {allowed.start} to {allowed.stop - 1}"
    else:
        words = "one of " + ", ".join(map(str, allowed))
    raise ValueError(f"{where} must be {words}, got {value!r:.40}")


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
            numbers += [entry.get(key, 0) for key in CPU_CHOICES]
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


def merge_section(
    old: Table, name: str, found: Mapping[str, Any], measured: Mapping[str, Mapping[str, int]]
) -> Table:
    """A table in which what was measured replaces what `old` says about the same calls.

    Args:
        old: is not changed. Its section of another device goes if there is another to put there.
        name: of the section. found: its new content, with the device.
        measured: for each phase the limits of the calls that were measured. Where `found` has no
            entry for a phase, the kernels' own choice was best.
    """
    before = old.get(name, {})
    if before.get("device", found.get("device")) != found.get("device"):
        if not set(found) - {"device"}:
            return dict(old)
        before = {}
    section = {**before, **found}
    if "decode" in measured:
        section = {k: v for k, v in section.items() if k in found or k not in GPU_NUMBERS}
    for phase in PHASES:
        kept = list(before.get(phase, ()))
        new = list(found.get(phase, ()))
        if phase in measured:
            where = dict(measured[phase])
            replaced = [limits_of(entry) for entry in (where, *new)]
            kept = [entry for entry in kept if limits_of(entry) not in replaced]
            if not new and any(_may_serve(entry, where) for entry in kept):
                new = [where]  # no parameters: the kernels' own
        section[phase] = [*new, *kept]
        if not section[phase]:
            del section[phase]
    merged = {key: value for key, value in old.items() if key != name}
    if set(section) - {"device"}:
        merged[name] = section
    return merged


def limits_of(entry: Mapping[str, int]) -> dict[str, int]:
    """Which calls an entry serves, as it says it."""
    return {key: entry[key] for key in LIMITS if key in entry}


def _may_serve(entry: dict[str, int], where: Mapping[str, int]) -> bool:
    """Whether an entry serves some of the calls with these limits; `where` names its dim."""
    sizes = [where["bytes"]] if "bytes" in where else [1, 2, 4]
    return any(fits(entry, where["dim"], size) for size in sizes)
