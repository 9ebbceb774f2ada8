"""`python -m benchmarks.kernels`: the same as `python -m pykvcache bench kernels`."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.kernels import kernels

if __name__ == "__main__":
    sys.exit(run_function(kernels))
