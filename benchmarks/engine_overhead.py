"""`python -m benchmarks.engine_overhead`: `python -m pykvcache bench engine --overhead`."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.engine import overhead

if __name__ == "__main__":
    sys.exit(run_function(overhead))
