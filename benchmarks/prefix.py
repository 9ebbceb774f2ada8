"""`python -m benchmarks.prefix`: how much of a trace a prefix cache finds, by size of the pool."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.prefix import prefix

if __name__ == "__main__":
    sys.exit(run_function(prefix))
