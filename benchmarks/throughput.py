"""`python -m benchmarks.throughput`: the same as `python -m pykvcache bench engine`."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.engine import engine

app = single(engine)

if __name__ == "__main__":
    sys.exit(run(app))
