"""Which launches race on a GPU, where each has to be compiled for each block size.

The grid has hundreds of pairs of launch and block size, at a second or so of compiling each, and
some need more shared memory than the chip has. So launches are first tried at one block size, and
only the quickest of them race at the others, as many as the time allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pykvcache.bench.tune.search import DEFAULT, Candidate, Launch
from pykvcache.bench.tune.shapes import Shape

MIDDLE_BLOCK_SIZE = 16
SHARE = 1 / 3  # of the time: for trying launches, and again for compiling those that stay


class Kernels(Protocol):
    """What is asked of measure.Bench."""

    def check(self, candidates: Sequence[Candidate]) -> None: ...

    def decode(self, candidate: Candidate) -> float: ...


def screen(
    bench: Kernels,
    sizes: Sequence[int],
    launches: Sequence[Launch],
    seconds: float,
    clock: Callable[[], float],
) -> list[Candidate]:
    """Checked candidates, the default launch of every block size among them.

    Launches are tried in a shuffled order, so that what the time leaves out is no corner of the
    grid. A default launch that the chip has no room for is raised.
    """
    start = clock()
    middle = min(sizes, key=lambda size: abs(size - MIDDLE_BLOCK_SIZE))
    order = [launch for launch in launches if launch != DEFAULT]
    random.Random(0).shuffle(order)
    times: dict[Launch, float] = {}
    tried = 0
    for launch in (DEFAULT, *order):
        if tried and clock() - start > SHARE * seconds:
            break
        tried += 1
        candidate = Candidate(middle, launch)
        if runs(bench, candidate):
            times[launch] = bench.decode(candidate)
    others = [size for size in sizes if size != middle]
    cost = (clock() - start) / tried * max(1, len(others))
    room = int(SHARE * seconds / cost) if cost > 0 else len(times)
    quickest = sorted(times, key=lambda launch: times[launch])[: max(0, room - 1)]
    kept = [DEFAULT, *(launch for launch in quickest if launch != DEFAULT)]
    found = [Candidate(middle, launch) for launch in kept]
    found += [c for size in others for c in (Candidate(size, g) for g in kept) if runs(bench, c)]
    return found


def runs(bench: Kernels, candidate: Candidate) -> bool:
    """Check a candidate; False if the chip has no room for its launch."""
    try:
        bench.check([candidate])
    except Exception as error:
        if candidate.launch == DEFAULT or not is_out_of_resources(error):
            raise
        return False
    return True


def is_out_of_resources(error: BaseException) -> bool:
    """Whether Triton says that a kernel needs more of the chip than there is."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def fits_shared_memory(shape: Shape, launch: Launch, limit: int | None) -> bool:
    """Whether a launch may fit; a lower bound of its need, which saves compiling it.

    A pipeline of n stages keeps n - 1 tiles of K and of V; limit: bytes of a program, None =
    not known.
    """
    if limit is None or not launch.tile:
        return True
    padded = 1 << (shape.head_dim - 1).bit_length()
    tile = 2 * launch.tile * padded * shape.torch_dtype.itemsize
    return (launch.stages - 1) * tile <= limit


def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that one program may ask for."""
    properties = torch.cuda.get_device_properties(device)
    found = getattr(properties, "shared_memory_per_block_optin", None)
    return None if found is None else int(found)
