"""`python -m benchmarks.generate`: the same as `python -m pykvcache bench generate`."""

from __future__ import annotations

import sys

from pykvcache.cli import run, single
from pykvcache.cli.bench.generate import generate

app = single(generate)

if __name__ == "__main__":
    sys.exit(run(app))
