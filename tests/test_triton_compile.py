"""Triton kernels compile for chips that are not here, fit their shared memory and do not spill.

This is the part for every day; `python tests/triton_resources.py` compiles every kernel for every
chip, .ci/run the rest of two of them. Run with `-s` to see
what each kernel needs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_resources.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch: str) -> None:
    command = [sys.executable, str(SCRIPT), arch, "--quick", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("registers") >= 100
