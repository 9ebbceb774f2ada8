"""`python -m benchmarks.allocator`: the same as `python -m pykvcache bench allocator`."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.allocator import allocator

app = single(allocator)

if __name__ == "__main__":
    sys.exit(run(app))
