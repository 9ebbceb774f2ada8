"""What the tests take for a GPU, decided before anything imports Triton or asks torch for one.

The real one where there is one; with PYKVCACHE_SIMULATED_GPU=file the simulated one, whose compiled
part is kept in that file; otherwise none: operators of GPU backends then run in emulation.
"""

from __future__ import annotations

import os
from pathlib import Path

import simulated_gpu
import torch

SIMULATED = os.environ.get("PYKVCACHE_SIMULATED_GPU", "")

if SIMULATED:
    simulated_gpu.install(Path(SIMULATED))
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
