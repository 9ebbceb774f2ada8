"""Every Triton kernel compiles for every target without a GPU, and the important ones do not spill.

Run with `-s` to see shared memory, registers and spills.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

WITH_FEATURES = "sm_90"
SCRIPT = Path(__file__).with_name("triton_resources.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "prefill", "others"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_without_spills(arch: str, phase: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    selection = "all" if arch == WITH_FEATURES else "shapes"  # features take minutes
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch, phase, selection],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("registers") >= 8
