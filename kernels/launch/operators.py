"""The operators of backend "triton".

Read next: attention.py, cache.py.
"""

from __future__ import annotations

import torch
from pykvcache.kernels.launch.attention import merge_states, paged_attention, plan
from pykvcache.kernels.launch.cache import copy_blocks, gather_kv, slot_mapping, write_kv
from pykvcache.kernels.launch.table import INTERPRETED

_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make these the operators of namespace pykvcache_triton."""
    if _libraries:
        return
    library = torch.library.Library("pykvcache_triton", "IMPL")
    _libraries.append(library)
    operators = (
        write_kv, paged_attention, merge_states, copy_blocks, gather_kv, slot_mapping, plan,
    )  # fmt: skip
    for operator in operators:
        library.impl(operator.__name__, operator, "CUDA")
        if INTERPRETED:
            library.impl(operator.__name__, operator, "CPU")
