"""Fake operators: shapes and dtypes of results without computing them, for `torch.compile`.

Read first: pykvcache/operators.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _fake_paged_attention(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    v_head_dim = args[16]
    out = q.new_empty(q.shape[0], q.shape[1], v_head_dim)
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)


def _fake_merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _fake_gather_kv(
    k_cache: Tensor,
    v_cache: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_k: Tensor,
    total_k: int,
) -> tuple[Tensor, Tensor]:
    v_dim = 0 if v_cache is None else v_cache.shape[3]
    k = k_cache.new_empty(total_k, k_cache.shape[1], k_cache.shape[3])
    return k, k_cache.new_empty(total_k, k_cache.shape[1], v_dim)


def _fake_slot_mapping(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, num_tokens: int, block_size: int
) -> Tensor:
    return block_table.new_empty(num_tokens, dtype=torch.int64)


def _fake_empty_plan(seq_lens: Tensor, *args: Any) -> Tensor:
    return seq_lens.new_empty(0, dtype=torch.int32)


def _fake_device_plan(seq_lens: Tensor, *args: Any) -> Tensor:
    return seq_lens.new_empty(seq_lens.shape[0] + 1, dtype=torch.int32)


_FAKES: dict[str, Callable[..., Any]] = {
    "write_kv": lambda *args: None,
    "paged_attention": _fake_paged_attention,
    "merge_states": _fake_merge_states,
    "copy_blocks": lambda *args: None,
    "gather_kv": _fake_gather_kv,
    "slot_mapping": _fake_slot_mapping,
    "plan": _fake_empty_plan,
}
_DEVICE_PLANS = ("triton", "cuda")  # backends whose plan is int32 [B + 1]


def for_operator(backend: str, name: str, schema: str) -> Callable[..., Any]:
    """The fake operator, for tensors that are all on "meta" or (FakeTensors) not at all.

    One meta tensor among real ones is enough for the dispatcher to come here, and its result would
    be memory that nothing has written.
    """
    arguments = re.findall(r"(\w+)(?:,|\)|=)", schema.split("->")[0])
    compute = _FAKES[name]
    if name == "plan" and backend in _DEVICE_PLANS:
        compute = _fake_device_plan

    def fake(*args: Any, **kwargs: Any) -> Any:
        tensors = [
            (argument, tensor)
            for argument, value in [*zip(arguments, args, strict=False), *kwargs.items()]
            for tensor in (value if isinstance(value, list) else [value])
            if isinstance(tensor, Tensor)
        ]
        others = [tensor for _, tensor in tensors if tensor.device.type != "meta"]
        for argument, tensor in tensors:
            if others and tensor.device.type == "meta":
                raise ValueError(f"{argument} must be on {others[0].device}, got meta")
        return compute(*args, **kwargs)

    return fake
