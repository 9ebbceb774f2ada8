"""What the commands measure and compare: traces, timing, peaks, kernel cases, generation.

Nothing here prints; pykvcache/cli/ and benchmarks/ do. Read first: pykvcache/bench/timing.py.
"""
