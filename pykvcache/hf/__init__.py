"""The drop-in for Hugging Face transformers, 5.17 to 5.23. Start with pykvcache/hf/cache.py."""

from __future__ import annotations

from pykvcache.hf.cache import PagedCache
from pykvcache.hf.counters import counters
from pykvcache.hf.patching import patch, patched, unpatch

__all__ = ["PagedCache", "counters", "patch", "patched", "unpatch"]
