"""pykvcache: a block-paged KV cache for PyTorch and Hugging Face models.

Importing this package loads neither transformers nor the compiled extension; the names below load
what they need when they are first used. The code is best read from pykvcache/reference.py on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykvcache import ops
    from pykvcache.allocator import BlockAllocator
    from pykvcache.attention import PagedAttention
    from pykvcache.cache import KVPool
    from pykvcache.engine import Engine, Sampling
    from pykvcache.errors import OutOfBlocks
    from pykvcache.hf import PagedCache, patch, patched, unpatch
    from pykvcache.metadata import AttentionMetadata

__version__ = "0.1.0"
__all__ = [
    "AttentionMetadata",
    "BlockAllocator",
    "Engine",
    "KVPool",
    "OutOfBlocks",
    "PagedAttention",
    "PagedCache",
    "Sampling",
    "ops",
    "patch",
    "patched",
    "unpatch",
]
_HOMES = {
    "AttentionMetadata": "pykvcache.metadata",
    "BlockAllocator": "pykvcache.allocator",
    "Engine": "pykvcache.engine",
    "KVPool": "pykvcache.cache",
    "OutOfBlocks": "pykvcache.errors",
    "PagedAttention": "pykvcache.attention",
    "PagedCache": "pykvcache.hf",
    "Sampling": "pykvcache.engine",
    "patch": "pykvcache.hf",
    "patched": "pykvcache.hf",
    "unpatch": "pykvcache.hf",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("pykvcache.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
