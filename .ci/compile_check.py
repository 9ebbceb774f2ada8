"""Compile all of csrc/ with another compiler, warnings as errors; nothing is linked.

Sources and flags are those of setup.py. A compiler that is not installed is one line and success.

    python .ci/compile_check.py --machine aarch64 --compiler aarch64-linux-gnu-g++
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def compile_commands(compiler: str, machine: str) -> list[list[str]]:
    """One command a source and instruction set, as setup.py would build for `machine`."""
    with mock.patch("setuptools.setup"), mock.patch("platform.machine", lambda: machine):
        build = runpy.run_path(str(ROOT / "setup.py"))
        flags = shlex.split(build["compile_flags"]())
        return [
            [compiler, *flags, *shlex.split(extra), "-Werror", "-c", str(source), "-o", os.devnull]
            for source, _, extra in build["native_sources"]()
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--machine", default=platform.machine())
    options = parser.parse_args()
    if shutil.which(options.compiler) is None:
        print(f"skipped: {options.compiler} is not installed")
        return 0
    commands = compile_commands(options.compiler, options.machine)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = sum(pool.map(lambda command: subprocess.call(command) != 0, commands))
    print(f"{options.compiler} for {options.machine}: {len(commands)} compiled, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
