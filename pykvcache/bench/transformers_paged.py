"""transformers' own paged attention as a peer: the cache of its continuous batching, and SDPA.

A step of continuous batching writes the new tokens into PagedAttentionCache, gathers the tokens of
all rows into one dense K and V by an index for every token, and calls SDPA once for all rows with a
mask [1, 1, T, tokens] whose blocks are the rows. That is what is timed; indices and mask, which all
layers of a step share, are made before.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykvcache.bench.timing import Missing

if TYPE_CHECKING:
    from pykvcache.bench.kernels import Workload

PAGE = 256  # tokens; the default of transformers
KIND = "full_attention"
MOST_MASK_ELEMENTS = 2**28
MOST_CALL_SECONDS = 5.0


@dataclass
class Row:
    """What the cache asks of a request."""

    request_id: str

    def current_len(self) -> int:
        return 0


def paged(workload: Workload) -> Callable[[int], Tensor]:
    """A call of the contender; it returns [T, HQ, D].

    Raises:
        Missing: too large or too slow for a benchmark. Anything else: other versions.
    """
    case = workload.case
    if case.phase == "chunk":
        raise Missing("is measured for decode and prefill only")
    queries, keys = case.batch * case.query_len, case.batch * case.length
    if queries * keys > MOST_MASK_ELEMENTS:
        raise Missing(f"would need a mask of {queries:,} x {keys:,} in {case.name}")
    cache = make_cache(workload)
    reads, writes = fill(cache, workload)
    mask = block_mask(workload)
    attend = attention_function()
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=workload.device) * case.length
    module = SimpleNamespace(
        layer_idx=0, num_key_value_groups=case.heads.group, is_causal=True, training=False
    )
    query = workload.packed_q.transpose(0, 1)[None]  # [1, HQ, T, D]

    def run(call: int) -> Tensor:
        copy = (call + workload.copies // 3) % workload.copies
        found: Tensor = attend(
            module,
            query,
            new_tokens(workload, workload.k[copy]),
            new_tokens(workload, workload.v[copy]),
            mask,
            scaling=case.heads.head_dim**-0.5,
            cache=cache,
            cu_seq_lens_k={KIND: starts},
            max_length_k={KIND: case.length},
            read_index=[reads[copy]],
            write_index=[writes[copy]],
        )[0]
        return found[0]

    with torch.no_grad():
        run(0)
        began = time.perf_counter()
        run(0)
        seconds = time.perf_counter() - began
    if seconds > MOST_CALL_SECONDS:
        raise Missing(f"takes {seconds:.1f} s a call in {case.name}")
    return torch.no_grad()(run)


def attention_function() -> Callable[..., Any]:
    """The one that reads the paged cache; it has moved between versions."""
    from transformers.integrations import sdpa_attention, sdpa_paged

    found: Callable[..., Any] = sdpa_attention.sdpa_attention_forward
    if "cache" not in inspect.signature(found).parameters:
        found = sdpa_paged.sdpa_attention_paged_forward
    return found


def make_cache(workload: Workload) -> Any:
    """A cache of one layer with room for all copies."""
    from transformers import ContinuousBatchingConfig, LlamaConfig
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.distributed import DistributedHelper

    case, heads = workload.case, workload.case.heads
    config = LlamaConfig(
        hidden_size=heads.num_heads * heads.head_dim,
        num_attention_heads=heads.num_heads,
        num_key_value_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        num_hidden_layers=1,
    )
    pages = workload.copies * case.batch * -(-case.length // PAGE)
    batching = ContinuousBatchingConfig(
        num_blocks=pages + 8,
        **page_option(PAGE),
        max_batch_tokens=case.batch * case.query_len,
        max_memory_percent=0.9,
    )
    settings = {"dtype": case.dtype, "distributed_helper": DistributedHelper(None, None)}
    if "tp_plan" in inspect.signature(PagedAttentionCache).parameters:  # before 5.23
        settings["tp_plan"] = {}
    return PagedAttentionCache(config, batching, workload.device, **settings)


def page_option(tokens: int) -> dict[str, int]:
    """The size of a page, as an argument of transformers' ContinuousBatchingConfig."""
    from transformers import ContinuousBatchingConfig

    known = inspect.signature(ContinuousBatchingConfig).parameters
    return {"page_size" if "page_size" in known else "block_size": tokens}  # before 5.23


def fill(cache: Any, workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
    """Write all copies; for each the indices of the tokens to read and of the new ones to write.

    A prefill reads nothing back: transformers attends to the new K and V themselves.
    """
    case = workload.case
    decode = case.phase == "decode"
    ids = [[f"{copy} {row}" for row in range(case.batch)] for copy in range(workload.copies)]
    order = list(itertools.chain.from_iterable(ids))
    for place in torch.randperm(len(order)).tolist():
        if not reserve(cache, order[place], case.length):
            raise Missing("has no room for all copies")
    reads, writes = [], []
    is_old = hasattr(cache, "group_cache_managers")  # before 5.23
    managers = cache.group_cache_managers if is_old else [*cache.cache_allocators.values()]
    allocator = managers[0]
    for copy, rows in enumerate(ids):
        whole: list[int] = []
        new: list[int] = []
        for row in rows:
            whole += allocator.get_write_indices(row, 0, case.length)
            past = case.length - case.query_len
            new += allocator.get_write_indices(row, past, case.query_len)
        index = torch.tensor(whole, device=workload.device)
        sides = (x[copy].transpose(1, 2).flatten(0, 1) for x in (workload.k, workload.v))
        if is_old:
            for pages, side in zip((cache.key_cache[0], cache.value_cache[0]), sides, strict=True):
                pages.index_copy_(0, index, side)
        else:
            allocator.update(*sides, 0, index, index)
        reads.append(index if decode else index[:0])
        writes.append(torch.tensor(new, device=workload.device))
    return reads, writes


def reserve(cache: Any, request: str, tokens: int) -> bool:
    """Pages for a request; whether there are enough."""
    if hasattr(cache, "can_store_request_tokens"):
        return bool(cache.can_store_request_tokens(Row(request), tokens))
    return cache.allocate_blocks(-(-tokens // PAGE), request, 0) is not None


def new_tokens(workload: Workload, dense: Tensor) -> Tensor:
    """[B, HKV, L, D] -> the last query_len tokens of every row, [1, HKV, T, D]."""
    recent = dense[:, :, workload.case.length - workload.case.query_len :]
    return recent.transpose(0, 1).flatten(1, 2)[None]


def block_mask(workload: Workload) -> Tensor | None:
    """[1, 1, T, B * L], 0 where a query may look and the least number elsewhere."""
    case = workload.case
    q, length = case.query_len, case.length
    least = torch.finfo(case.dtype).min
    mask = torch.full((case.batch * q, case.batch * length), least, dtype=case.dtype)
    causal = torch.full((q, length), least, dtype=case.dtype).triu(length - q + 1)
    for row in range(case.batch):
        mask[row * q : (row + 1) * q, row * length : (row + 1) * length] = causal
    return mask[None, None].to(workload.device)
