"""What code asks of `torch.cuda`, for the simulated device.

Read first: device.py, capture.py.
"""

from __future__ import annotations

import threading
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from simulated_gpu.capture import Capture
from simulated_gpu.device import STATE
from simulated_gpu.tensor import DEVICE

TOTAL_MEMORY = 8 * 2**30
PROPERTIES = types.SimpleNamespace(
    name="simulated GPU",
    major=9,
    minor=0,
    multi_processor_count=4,
    total_memory=TOTAL_MEMORY,
    L2_cache_size=2**20,
    warp_size=32,
)


class Stream:
    """There is one order of work, so a stream has nothing to do."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.captures = False

    def wait_stream(self, other: Stream) -> None:
        """Done: work is over when it was started."""

    def wait_event(self, event: Event) -> None:
        """Likewise."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event of now."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """The host waits."""
        STATE.wait("Stream.synchronize")


DEFAULT_CAPTURE_STREAM = Stream()


class Event:
    """A point in time, of the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """It is now."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until another event."""
        return (end.seconds - self.seconds) * 1e3

    def synchronize(self) -> None:
        """The host waits."""
        STATE.wait("Event.synchronize")


class CUDAGraph:
    """A graph that `torch.cuda.graph` fills."""

    pools: ClassVar[dict[Any, weakref.WeakSet[CUDAGraph]]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.capture: Capture | None = None
        self.pool: Any = None

    def replay(self) -> None:
        """Run it again; graphs that share its memory lose what nobody holds."""
        if STATE.capture is not None:
            STATE.wait("replay")
        assert self.capture is not None
        for other in self.pools.get(self.pool, ()):
            if other is not self and other.capture is not None:
                other.capture.forget()
        self.capture.replay()

    def reset(self) -> None:
        """Forget what was captured."""
        self.capture = None


@contextmanager
def graph(
    cuda_graph: CUDAGraph,
    pool: Any = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Capture what this thread launches. Without a stream all captures share one."""
    STATE.wait("torch.cuda.graph")
    stream = stream or DEFAULT_CAPTURE_STREAM
    if stream.captures:
        raise RuntimeError("CUDA error: the stream is capturing already")
    capture, thread = Capture(), threading.get_ident()
    held = [thread, None] if capture_error_mode == "global" else [thread]
    STATE.captures.update(dict.fromkeys(held, capture))
    stream.captures = True
    try:
        yield
    finally:
        stream.captures = False
        for key in held:
            STATE.captures.pop(key, None)
        capture.end()
        if not capture.valid:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
    cuda_graph.capture, cuda_graph.pool = capture, pool
    if pool is not None:
        CUDAGraph.pools.setdefault(pool, weakref.WeakSet()).add(cuda_graph)


@contextmanager
def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _set_wait_mode(mode: str) -> None:
    STATE.wait_mode = mode


FAKES: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda device=None: PROPERTIES,
    "mem_get_info": lambda device=None: (TOTAL_MEMORY, TOTAL_MEMORY),
    "memory_allocated": lambda device=None: 0,
    "empty_cache": lambda: None,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: STATE.capture is not None,
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "synchronize": lambda device=None: STATE.wait("torch.cuda.synchronize"),
    "set_sync_debug_mode": _set_wait_mode,
    "get_sync_debug_mode": lambda: STATE.wait_mode,
    "graph_pool_handle": object,
    "stream": _nothing,
    "device": _nothing,
    "graph": graph,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
}
