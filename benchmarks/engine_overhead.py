"""`python -m benchmarks.engine_overhead`: `python -m pykvcache bench engine --overhead`."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.engine import overhead

app = single(overhead)

if __name__ == "__main__":
    sys.exit(run(app))
