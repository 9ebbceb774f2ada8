"""Continuous batching over blocks. Start with pykvcache/engine/sampling.py, then scheduler.py."""

from __future__ import annotations

from pykvcache.engine.engine import Engine
from pykvcache.engine.handle import Handle
from pykvcache.engine.sampling import Event, Output, Sampling, Score
from pykvcache.engine.stats import EngineStats

__all__ = ["Engine", "EngineStats", "Event", "Handle", "Output", "Sampling", "Score"]
