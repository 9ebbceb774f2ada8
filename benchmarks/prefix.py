"""`python -m benchmarks.prefix`: how much of a trace a prefix cache finds, by size of the pool."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.prefix import prefix

app = single(prefix)

if __name__ == "__main__":
    sys.exit(run(app))
