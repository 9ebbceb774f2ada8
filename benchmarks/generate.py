"""`python -m benchmarks.generate`: the same as `python -m pykvcache bench generate`."""

from __future__ import annotations

import sys

from pykvcache.cli import run_function
from pykvcache.cli.bench.generate import generate

if __name__ == "__main__":
    sys.exit(run_function(generate))
