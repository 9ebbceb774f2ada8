"""Graphs: what was launched while one was captured, run again with the same addresses.

While a graph is captured nothing is computed on a GPU. Here operators do run, to know the shapes of
their results, but what they wrote is taken back and what they returned is filled with nonsense.
A replay runs the recorded operators on the same memory. Memory that the graph took while it was
captured is its own; other memory is looked up by its address, and may be gone.

Read first: tensor.py. Read next: device.py.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from simulated_gpu.tensor import DeviceTensor

NONSENSE = 0xFF  # as bytes: NaN in floating-point numbers, -1 in integers


class Memory:
    """A tensor by its address: its storage may be freed while this exists."""

    def __init__(self, x: Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())
        self._dtype = x.dtype
        self._view = x.storage_offset(), x.size(), x.stride()

    def tensor(self) -> Tensor:
        """The tensor as it is now.

        Raises:
            RuntimeError: its memory was freed.
        """
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise RuntimeError("CUDA error: a graph uses memory that was freed")
        found: Tensor = torch.empty(0, dtype=self._dtype).set_(storage, *self._view)
        return found


class Launch:
    """One operator of a graph.

    Args:
        func, args, kwargs, result: what was called, and what it returned, all on the host.
        numbers: those of the arguments that were on the host anyway; their values are kept.
    """

    def __init__(
        self, func: Any, args: Any, kwargs: Any, result: Any, numbers: list[Tensor]
    ) -> None:
        constants = {id(x) for x in numbers}
        self.func = func
        self.inputs = tree_map_only(
            Tensor, lambda x: x.clone() if id(x) in constants else Memory(x), (args, kwargs)
        )
        known = {_address(x) for x in _tensors((args, kwargs))}
        self.outputs = [x if _address(x) not in known else None for x in _tensors(result)]

    def run(self) -> None:
        """Compute its results anew, into the memory of the first ones."""
        args, kwargs = tree_map_only(Memory, Memory.tensor, self.inputs)
        results = _tensors(self.func(*args, **kwargs))
        for target, result in zip(self.outputs, results, strict=True):
            if target is not None:
                target.copy_(result)


class Capture:
    """What one graph consists of.

    Attributes:
        valid: False after an operation that cannot be captured.
    """

    def __init__(self) -> None:
        self.valid = True
        self.launches: list[Launch] = []
        self._own: dict[int, Tensor] = {}  # by address of the storage
        self._seen: dict[int, weakref.WeakSet[DeviceTensor]] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """An operator will run: remember what it may overwrite."""
        for x in written(func, args, kwargs):
            address = _address(x)
            if address not in self._own and address not in self._before:
                everything = _bytes(x)
                self._before[address] = everything, everything.clone()

    def after(self, launch: Launch, wrapped: Any) -> None:
        """It has run, and its results are `wrapped` as device tensors."""
        self.launches.append(launch)
        for new in launch.outputs:
            if new is not None:
                self._own[_address(new)] = new
        for x in tree_leaves(wrapped):
            if isinstance(x, DeviceTensor) and _address(x.host) in self._own:
                self._seen.setdefault(_address(x.host), weakref.WeakSet()).add(x)

    def end(self) -> None:
        """Nothing has been computed."""
        with torch.inference_mode():
            self._take_back()

    def _take_back(self) -> None:
        for target, old in self._before.values():
            target.copy_(old)
        self._before.clear()
        for x in self._own.values():
            _bytes(x).fill_(NONSENSE)

    def forget(self) -> None:
        """Another graph with the same memory runs: what nobody holds is overwritten."""
        with torch.inference_mode():
            for address, x in self._own.items():
                if not len(self._seen.get(address, ())):
                    _bytes(x).fill_(NONSENSE)

    def replay(self) -> None:
        """Run everything."""
        with torch.inference_mode():
            for launch in self.launches:
                launch.run()


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors that an operator writes, by its schema."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found += _tensors(value)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
