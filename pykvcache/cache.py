"""The memory behind block ids: K and V tensors of every layer, and the allocator over them.

A block id names one slice of every storage. Storage i holds, per block, the keys and then the
values of the i-th layer of whichever layer group owns the block, so groups give each other the
blocks that they release. A layer sees its part as k_cache [num_blocks, HKV, block_size, D] and
v_cache [..., Dv]: views whose block stride is that of the storage. Float8 caches have their scales
in the block, too.

Read first: pykvcache/allocator.py, pykvcache/block_layout.py. Read next: pykvcache/attention.py.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from pykvcache import ops
from pykvcache.allocator import BlockAllocator
from pykvcache.block_layout import QUANTISED, BlockLayout
from pykvcache.checks import MAX_HEAD_DIM
from pykvcache.storage import allocate

MODEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KV_DTYPES = (*MODEL_DTYPES, QUANTISED)
MAX_BLOCKS = 2**31 - 1  # block ids are int32
MAX_BLOCK_SIZE = 65536


class KVPool:
    """Blocks of all layers of one model.

    Args:
        group_of: layer group of each layer, 0-based.
        block_size: tokens a block.
        num_blocks: fixed size of the pool.
        memory: fixed size in bytes, instead of num_blocks; needs to hold at least one block.
        kv_dtype: dtype of the caches; None = that of the first keys. float8_e4m3fn takes half the
            memory of 16-bit caches, and a float32 scale for every slot and head.
        backend: "auto" or a name from `ops.backends()`.
        deterministic: passed on to attention over this pool.
        prefix_cache: the allocator keeps an index of prefixes.
        windows: of each layer group, 0 = all positions, for that index.

    Without num_blocks and memory the pool grows. Nothing is allocated before `open`.

    Raises:
        ValueError, TypeError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        group_of: Sequence[int],
        block_size: int = 16,
        *,
        num_blocks: int | None = None,
        memory: int | None = None,
        kv_dtype: torch.dtype | None = None,
        backend: str = "auto",
        deterministic: bool = False,
        prefix_cache: bool = False,
        windows: Sequence[int] = (),
    ) -> None:
        block_size = parse_positive("block_size", block_size)
        if num_blocks is not None and memory is not None:
            raise ValueError(f"give num_blocks or memory, not both, got {num_blocks} and {memory}")
        if num_blocks is not None:
            num_blocks = parse_positive("num_blocks", num_blocks)
        if memory is not None:
            memory = parse_positive("memory", memory)
        if block_size > MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must be 1 to {MAX_BLOCK_SIZE}, got {block_size}")
        if num_blocks is not None and num_blocks > MAX_BLOCKS:
            raise ValueError(f"num_blocks must be 1 to {MAX_BLOCKS}, got {num_blocks}")
        for name, flag in (("deterministic", deterministic), ("prefix_cache", prefix_cache)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {flag!r}")
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {_names(KV_DTYPES)}, got {kv_dtype}")
        self.block_size, self.kv_dtype, self.backend = block_size, kv_dtype, backend
        self.fixed_blocks, self.memory, self.deterministic = num_blocks, memory, deterministic
        self.prefix_cache, self.windows = prefix_cache, tuple(windows)
        self.read_by_others = False  # a model reads keys and values by itself, not by operators
        self.group_of = list(group_of)
        layers = Counter(self.group_of)
        self.layers_of_group = [layers[group] for group in range(len(layers))]
        self.allocator: BlockAllocator | None = None
        # Held by whoever writes blocks or moves them: caches that share a pool may be used in
        # several threads. Reading needs no lock, a view keeps its storage alive.
        self.lock = threading.RLock()
        self.k_caches: list[Tensor | None] = [None] * len(self.group_of)
        self.v_caches: list[Tensor | None] = [None] * len(self.group_of)
        self.k_scales: list[Tensor | None] = [None] * len(self.group_of)
        self.v_scales: list[Tensor | None] = [None] * len(self.group_of)
        self._storages: list[Tensor] = []
        self._storage_of: list[int | None] = [None] * len(self.group_of)
        self._layouts: list[BlockLayout | None] = [None] * len(self.group_of)
        self._position = _positions(self.group_of)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a KVPool, and a cache that stands on one, can be neither pickled nor saved: its "
            "blocks belong to this process; copy.deepcopy(cache) copies the cache within it"
        )

    @property
    def growable(self) -> bool:
        """Whether the pool may take more memory when it is full."""
        return self.fixed_blocks is None and self.memory is None

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool; 0 before `open`."""
        return 0 if self.allocator is None else self.allocator.num_blocks

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all storages."""
        return sum(storage.nbytes for storage in self._storages)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all storages."""
        return sum(storage[0].nbytes for storage in self._storages)

    def open(self, k: Tensor, v: Tensor, wanted: int) -> BlockAllocator:
        """Fix the number of blocks and create the allocator.

        Args:
            k, v: keys and values of some layer, [B, HKV, T, D] and [B, HKV, T, Dv]; their sizes
                price a block when the pool is given in bytes (all layers are taken to be alike).
            wanted: blocks to start with when the size is not fixed.
        """
        size = wanted if self.fixed_blocks is None else self.fixed_blocks
        if self.memory is not None:
            price = max(self.layers_of_group) * self._layout(k, v).nbytes
            size = self.memory // price
            if size == 0:
                raise ValueError(
                    f"memory must hold at least one block of {price} bytes, got {self.memory}"
                )
            if size > MAX_BLOCKS:
                raise ValueError(
                    f"memory must hold at most {MAX_BLOCKS} blocks of {price} bytes, "
                    f"got {self.memory}"
                )
        self.allocator = BlockAllocator(
            max(size, 1),
            self.block_size,
            layers=self.layers_of_group,
            prefix_cache=self.prefix_cache,
            windows=self.windows if self.prefix_cache else (),
        )
        self.device = k.device
        self.ops = ops.table(self.backend, k.device.type)
        return self.allocator

    def caches(self, layer: int) -> tuple[Tensor, Tensor]:
        """k_cache and v_cache of a bound layer."""
        k_cache, v_cache = self.k_caches[layer], self.v_caches[layer]
        if k_cache is None or v_cache is None:
            raise ValueError(f"layer {layer} has no cache before its first update")
        return k_cache, v_cache

    def bind(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Give a layer its caches, shaped like k [B, HKV, T, D] and v [B, HKV, T, Dv]."""
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"k has {k.shape[1]} heads but v has {v.shape[1]}")
        if self.kv_dtype in (None, QUANTISED) and k.dtype not in MODEL_DTYPES:
            hint = "from the model: convert it, as in model.float()"
            raise TypeError(f"keys must be one of {_names(MODEL_DTYPES)}, got {k.dtype} {hint}")
        for name, dim in (("D", k.shape[3]), ("Dv", v.shape[3])):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise ValueError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {dim}")
        layout = self._layout(k, v)
        if self._layouts[layer] is not None:  # by another cache that shares this pool
            if self._layouts[layer] != layout:
                raise ValueError(f"layer {layer} of this pool has other shapes or another dtype")
            return
        self._layouts[layer] = layout
        self._storage_of[layer] = self._find_storage(layer, layout, k.device)
        self._view(layer)

    def _layout(self, k: Tensor, v: Tensor) -> BlockLayout:
        """Of a layer with keys [B, HKV, T, D] and values [B, HKV, T, Dv]."""
        dtype = self.kv_dtype or k.dtype
        return BlockLayout(k.shape[1], self.block_size, k.shape[3], v.shape[3], dtype)

    def _find_storage(self, layer: int, layout: BlockLayout, device: torch.device) -> int:
        """That of another group's layer at the same position, if it fits; else a new one."""
        for other, index in enumerate(self._storage_of):
            if index is None or self._position[other] != self._position[layer]:
                continue
            storage = self._storages[index]
            fits = layout.fits(storage.shape[1], storage.dtype)
            if fits and storage.device == device and self.group_of[other] != self.group_of[layer]:
                return index
        try:
            storage = allocate(self.num_blocks, layout.elements, layout.storage_dtype, device)
        except RuntimeError as error:
            raise MemoryError(
                f"num_blocks or memory is too large: {self.num_blocks} blocks of {layout.nbytes} "
                f"bytes a layer cannot be allocated on {device}"
            ) from error
        self._storages.append(storage)
        return len(self._storages) - 1

    def _view(self, layer: int) -> None:
        index, layout = self._storage_of[layer], self._layouts[layer]
        assert index is not None and layout is not None
        caches = layout.views(self._storages[index])
        self.k_caches[layer], self.v_caches[layer] = caches.k, caches.v
        self.k_scales[layer], self.v_scales[layer] = caches.k_scale, caches.v_scale

    def grow(self, needed: int, seen_blocks: int) -> None:
        """Make the pool larger; block ids stay valid. Copies one storage at a time.

        Args:
            needed: blocks that were missing, at least so many are added.
            seen_blocks: size at which they were missing; nothing is done if somebody else has made
                the pool larger since.
        """
        with self.lock:
            if self.num_blocks == seen_blocks:
                self._grow(max(2 * seen_blocks, seen_blocks + needed))

    def _grow(self, num_blocks: int) -> None:
        assert self.allocator is not None
        used = self.allocator.peak
        self.allocator.grow(num_blocks)
        for index, old in enumerate(self._storages):
            new = allocate(num_blocks, old.shape[1], old.dtype, old.device)
            new[:used] = old[:used]
            self._storages[index] = new
            del old
        for layer, bound in enumerate(self._storage_of):
            if bound is not None:
                self._view(layer)

    def group_storages(self, group: int) -> list[Tensor]:
        """Tensors [num_blocks, elements] that hold the layers of a group."""
        used = {
            index
            for layer, index in enumerate(self._storage_of)
            if index is not None and self.group_of[layer] == group
        }
        return [self._storages[index] for index in sorted(used)]

    def price(self, shapes: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Bytes of one block over all storages, when layers get keys and values like `shapes`."""
        storages: list[tuple[int, BlockLayout, set[int]]] = []
        for layer, states in enumerate(shapes):
            position, group = self._position[layer], self.group_of[layer]
            layout = self._layout(*states)
            for other, kept, groups in storages:
                fits = layout.fits(kept.elements, kept.storage_dtype)
                if other == position and fits and group not in groups:
                    groups.add(group)
                    break
            else:
                storages.append((position, layout, {group}))
        return sum(layout.nbytes for _, layout, _ in storages)

    def gather(
        self,
        layer: int,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_k: Tensor,
        total_k: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Dense keys [total_k, HKV, D] and values of a layer, as `ops.gather_kv`, in `dtype`."""
        where = block_table, seq_lens, cu_seqlens_k, total_k
        k, v = self.ops.gather_kv(*self.caches(layer), *where)
        k_scale, v_scale = self.k_scales[layer], self.v_scales[layer]
        if k_scale is not None and v_scale is not None:
            scales = self.ops.gather_kv(k_scale[..., None], v_scale[..., None], *where)
            k, v = k.float() * scales[0], v.float() * scales[1]
        return k.to(dtype), v.to(dtype)

    def copy_blocks(self, group: int, pairs: Tensor) -> None:
        """Copy blocks in all layers of a group: pairs int64 [N, 2] of (source, target)."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for storage in self.group_storages(group):
            by_device.setdefault(storage.device, []).append(storage)
        for device, storages in by_device.items():
            self.ops.copy_blocks(storages, storages, pairs.to(device))


def parse_positive(name: str, value: object) -> int:
    """An int of at least 1, from one of numpy, too.

    Raises:
        TypeError: it is no int. ValueError: it is less than 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _positions(group_of: Sequence[int]) -> list[int]:
    """Index of each layer within its group."""
    seen: Counter[int] = Counter()
    positions = []
    for group in group_of:
        positions.append(seen[group])
        seen[group] += 1
    return positions
