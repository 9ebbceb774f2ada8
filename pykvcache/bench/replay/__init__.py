"""Replays a trace under different ways to give memory to requests; no model is run.

plan.py has what a user asks for, loop.py the scheduling, space.py what a policy is, totals.py what
is summed and the definitions of the shares. docs/fragmentation.md explains the table. Read first:
plan.py, then loop.py.
"""
