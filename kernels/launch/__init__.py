"""The operators of backend "triton": checks, sizes, launch.

Read next: operators.py, then kernels/attention/decode.py.
"""

from pykvcache.kernels.launch.operators import register

__all__ = ["register"]
