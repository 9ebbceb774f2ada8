"""`python -m benchmarks.throughput`: the same as `python -m pykvcache bench engine`."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.engine import engine

if __name__ == "__main__":
    sys.exit(run_function(engine))
