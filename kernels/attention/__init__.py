"""Attention over blocks: plan, decode, prefill, merge. Start with decode.py."""
