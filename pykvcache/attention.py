"""Paged attention as an `nn.Module`, for models that are not from transformers.

Read first: pykvcache/metadata.py, pykvcache/cache.py. Read next: pykvcache/hf/cache.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from pykvcache import ops
from pykvcache.metadata import AttentionMetadata


class PagedAttention(nn.Module):
    """Writes new keys and values into their blocks, then attends over the blocks.

    Args:
        num_heads: HQ.
        head_dim: D of queries and keys, up to 576.
        num_kv_heads: HKV, a divisor of HQ; default HQ.
        scale: factor of q k^T; default head_dim ** -0.5.
        window: a query sees the last `window` positions, its own included; 0 = all.
        chunk: a query sees its own chunk of `chunk` positions only; 0 = all.
        softcap: scores become softcap * tanh(scores / softcap); 0 = off.
        causal: a query sees no later position.
        layout: "HND" or "NHD", of the caches.
        deterministic: a row's bits do not depend on the other rows of its batch.
        backend: "auto" or a name from `ops.backends()`.

    Raises:
        ValueError: a size is out of range; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        *,
        window: int = 0,
        chunk: int = 0,
        softcap: float = 0.0,
        causal: bool = True,
        layout: str = "HND",
        deterministic: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (
            ("num_heads", num_heads),
            ("head_dim", head_dim),
            ("num_kv_heads", num_kv_heads),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        if layout not in ops.LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(ops.LAYOUTS)}, got {layout!r}")
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window, self.chunk, self.softcap, self.causal = window, chunk, softcap, causal
        self.layout, self.deterministic, self.backend = layout, deterministic, backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor | None,
        metadata: AttentionMetadata,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        bias: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of this step's tokens over everything cached, the tokens themselves included.

        Args:
            q, k, v: [T, HQ, D], [T, HKV, D], [T, HKV, Dv]; v is None with v_cache=None, where V is
                the first D of K.
            k_cache, v_cache: the layer's blocks, written in place.
            metadata: of the step; its slot_mapping says where k and v go.
            sinks, alibi_slopes, bias: as in `ops.paged_attention`.
            k_scale, v_scale: as in `ops.write_kv`, which fills those of slots and channels.

        Returns:
            [T, HQ, Dv].

        Raises:
            ValueError, TypeError: an argument has the wrong shape, device or dtype.
        """
        ops.write_kv(
            k,
            v,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            layout=self.layout,
            k_scale=k_scale,
            v_scale=v_scale,
            backend=self.backend,
        )
        out, _ = ops.paged_attention(
            q,
            k_cache,
            v_cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            metadata.max_seqlen_q,
            scale=self.scale,
            causal=self.causal,
            window=self.window,
            chunk=self.chunk,
            softcap=self.softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            bias=bias,
            k_scale=k_scale,
            v_scale=v_scale,
            v_head_dim=self.head_dim if v_cache is None else None,
            layout=self.layout,
            plan=metadata.plan,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return out

    def extra_repr(self) -> str:
        """The sizes, for `print(module)`."""
        sizes = (
            f"{name}={getattr(self, name)}" for name in ("num_heads", "head_dim", "num_kv_heads")
        )
        return ", ".join(sizes)
