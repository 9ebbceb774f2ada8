"""Chooses a block size and launch parameters for a model, a trace and this device.

objective.py has what is maximised, search.py how candidates are dropped, measure.py what is timed,
plan.py the run as a whole, explain.py the account of one call. docs/tuning.md describes them.
"""
