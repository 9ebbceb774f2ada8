"""Decode steps as replayed graphs: one launch for the whole model, by batch bucket.

A captured forward reads tensors at fixed addresses, so a step is written into them first, by one
copy: ids, positions, slots, lengths and block tables. Rows that pad a bucket have no tokens in the
cache and slot -1: they write nothing, and their logits are dropped. The work partition of attention
is part of the graph, so it follows the lengths.

Read first: runner.py, staging.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pykvcache.batch import Batch, Int64Array
from pykvcache.engine.staging import Staging
from pykvcache.metadata import AttentionMetadata

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
MIN_COLUMNS = 64
FIRST_PAUSE = 16  # captures left out after memory was short in one; then twice as many
CAPTURING = threading.Lock()  # one engine of the process captures at a time
WARM_UPS = 2  # lazily created handles and compiled kernels are not captured


def buckets(largest: int) -> list[int]:
    """1, 2, 4, 8, then steps of half a power of two up to at least `largest`."""
    sizes, power = [1, 2, 4], 8
    while sizes[-1] < largest:
        sizes += [power, power * 3 // 2]
        power *= 2
    return sizes


class CudaRecorder:
    """Captures CUDA graphs on one device; all of them share their memory, as one runs at a time.

    Other threads may use the device meanwhile: only what this thread does is captured and checked.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Capture what `run` launches; its result is written by replays."""
        with CAPTURING, torch.cuda.device(self._device):
            return self._record(run)

    def _record(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._memory, stream, "thread_local"):
            result = run()
        return graph.replay, result


class Bucket:
    """Tensors that a captured decode step of `rows` rows reads.

    Attributes:
        ids, positions: int64 [1, rows].
        metadata: per layer group, block tables [rows, columns] and the rest of a decode step.
    """

    def __init__(self, rows: int, columns: int, groups: int, device: torch.device) -> None:
        self.rows, self.columns, self._groups = rows, columns, groups
        numbers = [((rows,), torch.int64)] * (2 + groups)  # ids, positions, slots of each group
        lengths, table = ((rows,), torch.int32), ((rows, columns), torch.int32)
        self._inputs = Staging([*numbers, lengths, *[table] * groups], device)
        ids, positions, *others = self._inputs.tensors
        self.ids, self.positions = ids[None], positions[None]
        slots, seq_lens, tables = others[:groups], others[groups], others[groups + 1 :]
        cu_seqlens_q = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.metadata = [
            AttentionMetadata(tables[group], seq_lens, cu_seqlens_q, 1, slots[group])
            for group in range(groups)
        ]
        self.replay: Replay | None = None
        self.logits: Tensor | None = None

    def fill(self, batch: Batch, ids: Int64Array, positions: Int64Array) -> None:
        """Write a step of at most `rows` rows, whose tables have at most `columns` columns."""
        inputs, groups, count = self._inputs, self._groups, len(ids)
        inputs.wait()
        values = [ids, positions, *batch.slot_mappings, batch.seq_lens]
        paddings = [0, 0, *[-1] * groups, 0]
        for array, value, padding in zip(inputs.arrays, values, paddings, strict=False):
            array[:count] = value
            array[count:] = padding
        for array, table in zip(inputs.arrays[-groups:], batch.block_tables, strict=True):
            array[:count, : table.shape[1]] = table
        inputs.send(count)


class DecodeGraphs:
    """Captures decode steps when they first come up, and replays them.

    Args:
        forward: method that computes logits [rows, V] from a bucket; only launches, no look at
            results. Held weakly, since its object holds the graphs.
        groups: layer groups.
        device: of the model.
        largest: most rows of a step.
        record: how to capture.
    """

    def __init__(
        self,
        forward: Callable[[Bucket], Tensor],
        groups: int,
        device: torch.device,
        largest: int,
        record: Recorder,
    ) -> None:
        self._forward = weakref.WeakMethod(forward)
        self._groups, self._device = groups, device
        self._record, self._sizes = record, buckets(largest)
        self._buckets: dict[int, Bucket] = {}
        self.captures = 0
        self.failure: str | None = None
        self._pause, self._patience = 0, FIRST_PAUSE

    def run(self, batch: Batch, ids: Int64Array, positions: Int64Array) -> Tensor | None:
        """Logits [len(ids), V] of a decode step; None where the model cannot be captured."""
        if self.failure is not None:
            return None
        rows, columns = len(ids), batch.block_tables[0].shape[1]
        size = next(size for size in self._sizes if size >= rows)
        bucket = self._buckets.get(size)
        if bucket is None or bucket.columns < columns:
            if self._pause:
                self._pause -= 1
                return None
            wide = max(MIN_COLUMNS, 1 << (columns - 1).bit_length())
            bucket = Bucket(size, wide, self._groups, self._device)
        bucket.fill(batch, ids, positions)
        if bucket.replay is None and not self._capture(bucket):
            return None
        self._buckets[size] = bucket
        assert bucket.replay is not None and bucket.logits is not None
        bucket.replay()
        return bucket.logits[:rows]

    def clear(self) -> None:
        """Forget all graphs: they read weights where they were when they were captured."""
        self._buckets.clear()

    def _capture(self, bucket: Bucket) -> bool:
        forward = self._forward()
        assert forward is not None
        try:
            bucket.replay, bucket.logits = self._record(lambda: forward(bucket))
        except RuntimeError as error:
            if _out_of_memory(error):  # of the moment: run this step without, and try later
                self._pause = self._patience
                self._patience *= 2
            else:  # code that looks at results on the host, as some experts do
                self.failure = str(error).partition("\n")[0]
            return False
        self.captures += 1
        return True


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was short, perhaps under an error that the end of the capture raised."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
