"""The operators of every backend: one schema table, their registration, and which of them is used.

Each backend has its own namespace of torch operators with the schemas below
(`pykvcache_cpu::write_kv`, `pykvcache_reference::write_kv`, ...), so any of them can be called on
its own, compiled with `torch.compile(fullgraph=True)` and checked with `torch.library.opcheck`.

Schemas are registered here, in Python, so that they exist even where nothing was compiled. C++
kernels are boxed and trust the schema: `check_signatures` compares the two when the extension is
loaded.

Read first: pykvcache/reference.py. Read next: pykvcache/ops.py.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykvcache import fakes, launch_table, reference

SCHEMAS: dict[str, str] = {
    "write_kv": (
        "(Tensor k, Tensor? v, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slot_mapping, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()"
    ),
    "paged_attention": (
        "(Tensor q, Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor cu_seqlens_q, int max_seqlen_q, float scale, bool causal, int window, int chunk, "
        "float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? k_scale, "
        "Tensor? v_scale, int v_head_dim, Tensor? plan, bool deterministic) -> (Tensor, Tensor)"
    ),
    "merge_states": "(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    "copy_blocks": "(Tensor[] src, Tensor(a!)[] dst, Tensor pairs) -> ()",
    "gather_kv": (
        "(Tensor k_cache, Tensor? v_cache, Tensor block_table, Tensor seq_lens, "
        "Tensor cu_seqlens_k, int total_k) -> (Tensor, Tensor)"
    ),
    "slot_mapping": (
        "(Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, int num_tokens, "
        "int block_size) -> Tensor"
    ),
    "plan": (
        "(Tensor seq_lens, Tensor cu_seqlens_q, int max_seqlen_q, int num_heads, int num_kv_heads, "
        "int head_dim, int window, int chunk, bool deterministic) -> Tensor"
    ),
}
BACKENDS = ("reference", "cpu", "triton", "cuda")
AUTO_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class OpTable:
    """The operators of one backend, each bound once: `table.write_kv(...)` is one dispatcher call.

    Arguments are positional, as in SCHEMAS; no default, no layout, no conversion.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        namespace = getattr(torch.ops, f"pykvcache_{backend}")
        for name in SCHEMAS:
            setattr(self, name, getattr(namespace, name).default)

    write_kv: Callable[..., None]
    paged_attention: Callable[..., tuple[Tensor, Tensor]]
    merge_states: Callable[..., tuple[Tensor, Tensor]]
    copy_blocks: Callable[..., None]
    gather_kv: Callable[..., tuple[Tensor, Tensor]]
    slot_mapping: Callable[..., Tensor]
    plan: Callable[..., Tensor]


_libraries: list[torch.library.Library] = []


def _register() -> None:
    for backend in BACKENDS:
        library = torch.library.Library(f"pykvcache_{backend}", "DEF")
        _libraries.append(library)  # a Library unregisters its operators when it dies
        for name, schema in SCHEMAS.items():
            library.define(name + schema)
            if backend == "reference":
                implementation = getattr(reference, name)
                library.impl(name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(
                f"pykvcache_{backend}::{name}",
                fakes.for_operator(backend, name, schema),
                lib=library,
                allow_override=True,
            )


def check_signatures(signatures: list[str], backend: str) -> None:
    """Raise ImportError when a C++ signature differs from the schema it is registered under."""
    namespace = getattr(torch.ops, f"pykvcache_{backend}")
    module = "_C_cuda" if backend == "cuda" else "_C"
    for signature in signatures:
        name, _, types = signature.partition("(")
        schema = getattr(namespace, name).default._schema
        expected = schema_types(schema)
        if f"({types}" != expected:
            raise ImportError(
                f"pykvcache.{module} was built from other sources: {name} takes ({types} in C++ "
                f"but {expected} in pykvcache/operators.py; rebuild with: pip install -e ."
            )


def schema_types(schema: torch.FunctionSchema) -> str:
    arguments = ",".join(_schema_word(argument.type) for argument in schema.arguments)
    returns = ",".join(_schema_word(value.type) for value in schema.returns)
    return f"({arguments})->({returns})"


def _schema_word(torch_type: object) -> str:
    """Optional[Tensor] -> Tensor?, List[Tensor] -> Tensor[], others as they are."""
    text = re.sub(r"Optional\[(\w+)\]", r"\1?", str(torch_type))
    return re.sub(r"List\[(\w+)\]", r"\1[]", text)


def name_bad_arguments(backend: str, take_bad_argument: Callable[[], str]) -> None:
    """Let bad arguments of C++ kernels be ValueErrors where torch says RuntimeError, from 2.15 on.

    Args:
        take_bad_argument: returns, once, what the newest bad argument of this thread was.
    """
    if not _hides_bad_arguments():
        return
    table = _tables[backend]
    for name in SCHEMAS:
        setattr(table, name, _naming(getattr(table, name), take_bad_argument))


@functools.cache
def _hides_bad_arguments() -> bool:
    """Whether torch does that; the CPU's operators tell, as tensors need no GPU for them."""
    nothing = torch.empty(0)
    try:
        _tables["cpu"].merge_states(nothing, nothing)
    except ValueError:
        return False
    except RuntimeError:
        return True
    raise AssertionError("merge_states took tensors without dims")


def _naming(operator: Callable[..., Any], take_bad_argument: Callable[[], str]) -> Any:
    def call(*arguments: Any) -> Any:
        try:
            return operator(*arguments)
        except RuntimeError as error:
            if str(error) == take_bad_argument():
                raise ValueError(str(error)) from None
            raise

    return call


def _load_cpu() -> str:
    try:
        from pykvcache import _C
    except ImportError as error:
        return f"not built or not loadable ({error}); build it with: pip install -e ."
    check_signatures(_C.signatures(), "cpu")
    if not hasattr(_C, "take_bad_argument"):
        raise ImportError("pykvcache._C is older than its sources; rebuild with: pip install -e .")
    launch_table.use_user_table_on_cpu()
    name_bad_arguments("cpu", _C.take_bad_argument)
    return "ready"


def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    import triton

    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    from pykvcache.kernels.launch import register

    register()
    return "ready"


def _load_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer, got {}.{}".format(*capability)
    try:
        from pykvcache import _C_cuda
    except ImportError as error:
        return (
            f"not built or not loadable ({error}); with a CUDA {torch.version.cuda.split('.')[0]} "
            "toolkit installed, build it with: PYKVCACHE_CUDA=1 pip install -e ."
        )
    check_signatures(_C_cuda.signatures(), "cuda")
    name_bad_arguments("cuda", _C_cuda.take_bad_argument)
    return "ready"


LOADERS: dict[str, Callable[[], str]] = {
    "reference": lambda: "ready",
    "cpu": _load_cpu,
    "triton": _load_triton,
    "cuda": _load_cuda,
}


@functools.cache
def _status(backend: str) -> str:
    """Load a backend; "ready", or why it is not."""
    return LOADERS[backend]()


def backends() -> dict[str, str]:
    """Every backend by name, with "ready" or the reason why it cannot be used."""
    return {backend: _status(backend) for backend in BACKENDS}


@functools.cache
def _best(device_type: str) -> str:
    """The first ready backend for a device; the reference, with a warning, when there is none."""
    for backend in AUTO_ORDER.get(device_type, ()):
        if _status(backend) == "ready":
            return backend
    warnings.warn(
        f"pykvcache runs its slow reference on {device_type!r}; "
        "`python -m pykvcache info` says why the other backends are not loaded",
        stacklevel=5,
    )
    return "reference"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose(backend: str, device_type: str) -> str:
    if backend == "auto":
        return _best(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if _status(backend) != "ready":
        raise RuntimeError(f"backend {backend!r} is not available: {_status(backend)}")
    return backend


def table(backend: str, device_type: str) -> OpTable:
    """The operators of `backend`, or of the best one for `device_type` when it is "auto".

    Raises:
        ValueError: `backend` is not a name in BACKENDS.
        RuntimeError: that backend cannot be used here; the message says why.
    """
    return _tables[_choose(backend, device_type)]


_register()
_tables = {backend: OpTable(backend) for backend in BACKENDS}
_status("cpu")  # a compiled part that drifted from SCHEMAS fails here, at import
