"""What the tests of the tuner share: a call to explain, a small model, a table on disk."""

from __future__ import annotations

import json
from pathlib import Path

from pykvcache.bench.tune.explain import CallSpec, describe_launch
from pykvcache.bench.tune.shapes import Shape

SPEC = "B=8,L=4096,HQ=32,HKV=8,D=128,block_size=16,dtype=bf16"
SMALL = Shape("small", 2, 4, 2, 16, "fp32", 1e5)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def explain(text: str = SPEC) -> dict[str, int]:
    return describe_launch(CallSpec.parse(text))[1]
