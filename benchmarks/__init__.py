"""Entry points: `python -m benchmarks.NAME`; the code that they run is pykvcache/bench/."""
