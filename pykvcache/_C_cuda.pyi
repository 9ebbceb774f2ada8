"""The CUDA part; see csrc/cuda/module.cpp."""

from typing import Any

def signatures() -> list[str]: ...
def take_bad_argument() -> str: ...
def explain_launch(
    dtype: int,
    cache_dtype: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    seq_lens: list[int],
    query_lens: list[int],
    /,
) -> list[dict[str, Any]]: ...
