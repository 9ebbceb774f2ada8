"""Launch choices: tiles, warps, stages and programs, read from table.json.

One section per architecture ("sm_90", "gfx942", ...). What a section leaves out is its vendor's
("gfx") or the default's: those serve every chip that has no section, so the default asks for no
more shared memory than the smallest NVIDIA chips of a generation have (99 KiB), "gfx" for no more
than 64 KiB.

An entry serves head dims up to `max_dim` and elements of up to `max_bytes`; the first that fits is
taken. Entries of the user's launch table (pykvcache/launch_table.py) come first. Nothing is tuned
at run time. Decode's `tile` depends on the head dim alone, because the plan of a step is made
before the dtype is known.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from pykvcache import launch_table

INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Choice:
    """How a kernel is launched: `rows` query rows by `tile` tokens, `warps`, pipeline `stages`."""

    tile: int
    warps: int
    stages: int
    rows: int = 0


@functools.cache
def _packaged() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("table.json").read_text()
    )
    return sections


_user_table: dict[str, dict[str, Any]] | None = None  # None: not looked for yet


def use(user_table: dict[str, Any]) -> None:
    """Take this as the user's table from the next call on."""
    global _user_table
    launch_table.check_table(user_table)
    _user_table = user_table
    for cached in (_section, choose, decode_tile, decode_programs):
        cached.cache_clear()


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and so on; "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _user_section(name: str) -> dict[str, Any]:
    table = launch_table.user_table() if _user_table is None else _user_table
    section: dict[str, Any] = table.get(name, {})
    return section


@functools.cache
def _section(name: str) -> dict[str, Any]:
    """What the package says; numbers of the user's table replace it, entries stand before."""
    packaged: dict[str, Any] = {}
    for part in ("default", "gfx" if name.startswith("gfx") else "", name):
        packaged |= _packaged().get(part, {})
    user = _user_section(name)
    return {**packaged, **{key: user[key] for key in user if key not in launch_table.PHASES}}


@functools.cache
def choose(phase: str, arch: str, head_dim: int, element_bytes: int) -> Choice:
    """The launch of "decode" or "prefill" for K of this head dim and elements of this size."""
    for entries in (_user_section(arch).get(phase, ()), _section(arch)[phase]):
        fitting = (e for e in entries if launch_table.fits(e, head_dim, element_bytes))
        entry = next(fitting, {})
        if "tile" in entry:
            return Choice(entry["tile"], entry["warps"], entry["stages"], entry.get("rows", 0))
    raise ValueError(f"table.json has no {phase} entry for head dim {head_dim}")


@functools.cache
def decode_tile(arch: str, head_dim: int) -> int:
    """Tokens of a KV tile in decode, for every dtype."""
    return choose("decode", arch, head_dim, 1).tile


@functools.cache
def processors(device: torch.device) -> int:
    """Of a GPU; 0 in the interpreter."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def decode_programs(device: torch.device, columns: int) -> int:
    """Persistent decode programs for each KV head, or each row tile of it."""
    section = _section(architecture(device))
    if "programs" in section:
        return int(section["programs"])
    return max(1, processors(device) * int(section["programs_per_sm"]) // columns)
