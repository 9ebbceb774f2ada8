"""Runs operators on device tensors, with the checks that a GPU would make.

Read first: tensor.py, capture.py. Read next: cuda_api.py.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simulated_gpu.capture import Capture, Launch
from simulated_gpu.tensor import KNOWN, DeviceTensor, to_device, to_host

COPIES = ("aten::_to_copy", "aten::copy_")
WAITS = {  # the size of their result, or the result itself, is known on the host
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
STAND_INS = {"pykvcache_cuda": "pykvcache_cpu", "pykvcache_triton": "pykvcache_cpu"}


class State:
    """What a process has of one GPU.

    Attributes:
        wait_mode: "default", or "error" where the host must not wait.
        captures: the graphs that are being captured, by thread; one that any thread disturbs
            (`capture_error_mode="global"`) is under None, too.
    """

    def __init__(self) -> None:
        self.wait_mode = "default"
        self.captures: dict[int | None, Capture] = {}

    @property
    def capture(self) -> Capture | None:
        """What this thread captures."""
        return self.captures.get(threading.get_ident())

    def wait(self, what: str) -> None:
        """The host waits for the device, if it may."""
        capture = self.capture or self.captures.get(None)
        if capture is not None:
            capture.valid = False
            raise RuntimeError(
                f"CUDA error: {what}: operation not permitted when stream is capturing"
            )
        if self.wait_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


STATE = State()


class Operators(TorchDispatchMode):
    """Operators with device tensors, or with a device argument."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in KNOWN for kind in types):
            return NotImplemented  # a subclass of the code under test comes first
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, DeviceTensor) for x in tensors)
        target = kwargs.get("device")
        if kwargs.get("pin_memory"):  # all of the host's memory is
            kwargs = {**kwargs, "pin_memory": False}
        if not on_device and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name
        if name in COPIES:
            return _copy(func, args, kwargs)
        if target is not None:
            on_device = target.type == "cuda"
            kwargs = {**kwargs, "device": torch.device("cpu")}
        _check_devices(name, args, tensors)
        _check_waits(name, args, kwargs)
        return _run(func, args, kwargs, on_device)


def _is_composite(func: Any) -> bool:
    """Whether it is made of other operators; in inference mode it is still in one piece."""
    kind = "CompositeImplicitAutograd"
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), kind)
    return found


def _stand_in(func: Any) -> Any:
    """The CPU's operator of this project for one of a GPU backend, which has the same contract."""
    space, _, name = func._schema.name.partition("::")
    if func is torch.ops.aten.histc.default:
        return _histc
    if space not in STAND_INS:
        return func
    return getattr(getattr(torch.ops, STAND_INS[space]), name).default


def _histc(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of integers, which the CPU's operator does not take."""
    return torch.histc(x.float(), *args, **kwargs).to(x.dtype)


def _run(func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> Any:
    host_args, host_kwargs = to_host((args, kwargs))
    run = _stand_in(func)
    if STATE.capture is not None:
        STATE.capture.before(func, host_args, host_kwargs)
    result = run(*host_args, **host_kwargs)
    if not on_device:
        return result
    written = [x for x in tree_leaves((args, kwargs)) if isinstance(x, DeviceTensor)]
    of_parameters = func.is_view and not any(x.is_inference() for x in written)
    with torch.inference_mode(False) if of_parameters else nullcontext():
        wrapped = _same_or_new(result, written)
    if STATE.capture is not None:
        numbers = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor]
        STATE.capture.after(Launch(run, host_args, host_kwargs, result, numbers), wrapped)
    return wrapped


def _same_or_new(result: Any, inputs: list[DeviceTensor]) -> Any:
    """Device tensors of results; an operator in place returns the tensor that it was given."""
    if isinstance(result, Tensor):
        for x in inputs:
            if x.host is result:
                _follow(x)
                return x
    elif isinstance(result, (list, tuple)):
        return type(result)(_same_or_new(x, inputs) for x in result)
    return to_device(result)


def _follow(x: DeviceTensor) -> None:
    """An operator in place has changed the shape of `x.host`: of x, too."""
    if x.shape != x.host.shape or x.stride() != x.host.stride():
        raise NotImplementedError("operators that resize a tensor in place are not simulated")


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Copies may cross between devices; those that do wait unless they are non_blocking."""
    source = args[1] if func._schema.name == "aten::copy_" else args[0]
    target = kwargs.get("device")
    to_gpu = isinstance(args[0], DeviceTensor) if target is None else target.type == "cuda"
    if target is not None and target.type == "meta":
        return func(*to_host(args), **kwargs)
    from_gpu = isinstance(source, DeviceTensor)
    if to_gpu != from_gpu:
        blocking = not kwargs.get("non_blocking") and True not in args[2:3]
        if blocking or STATE.capture is not None:
            STATE.wait("a copy between the host and the device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return _run(func, args, kwargs, to_gpu)


def _check_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    """All operands are on the device, but for single numbers and the indices of a lookup."""
    allowed = tree_leaves(args[1]) if name in INDEXED else []
    for x in tensors:
        if not isinstance(x, DeviceTensor) and x.dim() and not any(x is index for index in allowed):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} found at least two, "
                "cuda:0 and cpu"
            )


def _check_waits(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in WAITS:
        STATE.wait(name)
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        STATE.wait(name)
    if name in INDEXED:
        for index in tree_leaves(args[1]):
            if isinstance(index, Tensor) and (
                index.dtype in (torch.bool, torch.uint8) or not isinstance(index, DeviceTensor)
            ):
                STATE.wait(f"{name} with a mask or with indices on the host")


class Methods(TorchFunctionMode):
    """Methods of tensors that do not arrive as operators."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], DeviceTensor) and func in _METHODS:
            return _METHODS[func](*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index(args[0], args[1]), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            rest = {**(kwargs or {})}
            device = torch.device(rest.pop("device"))
            return func(*args, **rest).to(device)
        return func(*args, **(kwargs or {}))


def _index(x: Tensor, index: Any) -> Any:
    """An index whose lists are tensors on the device of x."""
    if isinstance(index, tuple):
        return tuple(_index(x, part) for part in index)
    if isinstance(index, (list, np.ndarray)) and isinstance(x, DeviceTensor):
        values = np.asarray(index)
        return torch.as_tensor(values if values.size else values.astype(np.int64)).to(x.device)
    return index


def _numpy(x: DeviceTensor, **kwargs: Any) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")


def _tolist(x: DeviceTensor) -> Any:
    STATE.wait("tolist")
    return x.host.tolist()


def _set_data(x: DeviceTensor, value: Tensor) -> None:
    if not isinstance(value, DeviceTensor):
        raise NotImplementedError("parameters that move to the host in place are not simulated")
    x.host = value.host
    torch.Tensor.data.__set__(x, value)  # type: ignore[attr-defined]


_METHODS: dict[Any, Any] = {
    Tensor.data_ptr: lambda x: x.host.data_ptr(),
    Tensor.untyped_storage: lambda x: x.host.untyped_storage(),
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.pin_memory: _numpy,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
