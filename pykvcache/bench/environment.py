"""What a figure was measured on: versions, device, threads, commit. Saved beside every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pykvcache import __version__, launch_table, ops

PACKAGES = ("pykvcache", "torch", "transformers", "triton", "numpy", "flashinfer-python")


def describe() -> dict[str, Any]:
    """Versions, device, threads, backends, commit and date, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": launch_table.processor(),
        "cpu_isa": cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": ops.backends(),
    }


def versions() -> dict[str, str | None]:
    """Version of Python and of each package in PACKAGES; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"pykvcache": __version__, "torch": torch.__version__}


def cpu_isa() -> str | None:
    """Instruction set that the CPU kernels run with; None when they are not built."""
    if ops.backends()["cpu"] != "ready":
        return None
    from pykvcache import _C

    return _C.cpu_isa()


def commit() -> str | None:
    """Commit of the checkout that pykvcache runs from, with "+" when files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        name = _git(root, "rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
