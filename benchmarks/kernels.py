"""`python -m benchmarks.kernels`: the same as `python -m pykvcache bench kernels`."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.kernels import kernels

app = single(kernels)

if __name__ == "__main__":
    sys.exit(run(app))
