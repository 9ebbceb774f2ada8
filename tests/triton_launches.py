"""Which kernels the Triton launchers would compile on a GPU that is not here.

The launchers run as they are, on meta tensors, with a driver that only knows its target. Triton
specialises every launch and hands it to `jit_cache_hook`, which notes it and forbids compiling. So
what is listed is what a user's call compiles: constants, argument types, alignments and options.

Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from pykvcache.kernels.launch import attention, cache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "sm_120": GPUTarget("cuda", 120, 32),  # stands for chips that the launch table does not name
}
PROGRAMS = 33  # of decode for each group


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would compile it."""

    kernel: Any  # triton.JITFunction
    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constant(self, name: str) -> Any:
        """A constant by its parameter's name; None for an optional tensor that is not given."""
        return self.constants.get((self.kernel.arg_names.index(name),))

    def compile(self, arch: str) -> Any:
        """Through to machine code."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=TARGETS[arch], options=dict(self.options))


class Absent:
    """A driver for a device that is not here: enough to specialise a launch, not to do it."""

    def __init__(self, arch: str) -> None:
        self.number, self.target = list(TARGETS).index(arch), TARGETS[arch]

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def noting_launches(arch: str, processors: int = 0) -> Iterator[list[Launch]]:
    """The launches of what is called inside, in order, one entry for each call of a kernel."""
    noted: list[Launch] = []

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        noted.append(
            Launch(
                fn.jit_function, f"{fn.name} {key}", compile["signature"], compile["constants"],
                compile["configs"][0], options,
            )
        )  # fmt: skip
        return True  # do not compile

    hook, driver = triton.knobs.runtime.jit_cache_hook, triton.runtime.driver
    triton.knobs.runtime.jit_cache_hook = note
    before = driver._active
    driver.set_active(Absent(arch))
    try:
        with (
            mock.patch.object(attention, "architecture", lambda device: arch),
            mock.patch.object(attention, "decode_programs", lambda *_: PROGRAMS),
            mock.patch.object(attention, "processors", lambda device: processors),
            mock.patch.object(attention, "reads_values", lambda tensor: False),
            mock.patch.object(cache, "reads_values", lambda tensor: False),
        ):
            yield noted
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        driver._active = before
