"""`python -m benchmarks.allocator`: the same as `python -m pykvcache bench allocator`."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.allocator import allocator

if __name__ == "__main__":
    sys.exit(run_function(allocator))
