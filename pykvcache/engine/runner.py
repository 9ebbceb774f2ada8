"""The packed forward of an unmodified transformers model.

All rows of a step go through the model as one sequence [1, T] with position ids; each attends to
its own blocks. Logits are computed only where the step wants them.

Read first: hf/packed.py, hf/packed_attention.py, scheduler.py. Read next: engine.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache

from pykvcache.batch import Batch, Int64Array
from pykvcache.engine.graphs import Bucket, CudaRecorder, DecodeGraphs
from pykvcache.engine.linears import Linears
from pykvcache.engine.request import ranges
from pykvcache.engine.step import Step
from pykvcache.hf.arguments import check_model
from pykvcache.hf.packed import PackedCache
from pykvcache.hf.packed_attention import SEES_LATER, observed, packed_attention, register
from pykvcache.hf.reaches import LATER, Reaches
from pykvcache.metadata import AttentionMetadata

PROBE_LENGTHS = ((5, 3), (2, 1), (1, 1))  # of two prompts; the first pair that fits the pool
SAME_DIRECTION = 0.95  # cosine of logits; rounding stays far above, a wrong mask far below
LOGITS_ONLY = {  # as arguments of a forward that takes them
    "return_dict": True,
    "output_router_logits": False,
    "output_hidden_states": False,
    "output_attentions": False,
}


class ModelRunner:
    """Runs steps of a model over blocks.

    Args:
        model: a decoder-only causal LM; its weights are used as they are, nothing is copied.
        largest: most rows of a step.
        cuda_graphs: replay decode steps as graphs where the model is on a GPU.
        settings: arguments of `KVPool` but the layers.

    Raises:
        TypeError: not a transformers model.
        ValueError: the model cannot be packed; the message says why.
    """

    def __init__(
        self, model: PreTrainedModel, largest: int, cuda_graphs: bool, **settings: Any
    ) -> None:
        check_packable(model)
        register()
        self.model, self.device = model, model.device
        self.cache = PackedCache(model, **settings)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._logits_only = logits_only(model)
        self._linears = Linears(model)
        self._batch: Batch | None = None
        self._revision = -1
        self.graphs: DecodeGraphs | None = None
        self._metadata: list[AttentionMetadata] = []
        with torch.no_grad():  # not inference mode, whose tensors could not be written elsewhere
            self._probe()
        if cuda_graphs and self.device.type == "cuda":
            groups = len(self.cache.windows)
            record = CudaRecorder(self.device)
            self.graphs = DecodeGraphs(self._forward_bucket, groups, self.device, largest, record)

    @property
    def vocabulary(self) -> int:
        """Tokens that the embedding knows."""
        known = vocabulary_of(self.model)
        assert known is not None
        return known

    def copy_blocks(self, copies: list[Int64Array]) -> None:
        """Copy blocks before a step writes: per group int64 [N, 2] of (source, target)."""
        for group, pairs in enumerate(copies):
            if len(pairs):
                self.cache.pool.copy_blocks(group, torch.from_numpy(pairs))

    def run(self, step: Step, ids: Int64Array) -> Tensor:
        """Compute a step: ids int64 [T], row by row. Returns the wanted logits, [sum(wanted), V].

        Keys and values of all its tokens are in their blocks afterwards.
        """
        starts, counts, wanted = step.starts, step.counts, step.wanted
        is_decode = len(ids) == len(counts)
        positions = starts if is_decode else ranges(starts, counts)
        rows = None
        if wanted.sum() < len(ids):
            rows = ranges(counts.cumsum() - wanted, wanted)
        self.copy_blocks(step.copies)
        if self.graphs is not None and is_decode and rows is None:
            logits = self.graphs.run(step.batch, ids, positions)
            if logits is not None:
                return logits
        self._bind(step.batch)
        self.cache.begin(self._metadata, int((starts + counts).sum()))
        return self._forward(
            torch.from_numpy(ids)[None].to(self.device),
            torch.from_numpy(positions)[None].to(self.device),
            None if rows is None else torch.from_numpy(rows).to(self.device),
        )

    def _forward_bucket(self, bucket: Bucket) -> Tensor:
        """A decode step over the tensors of a bucket, to be captured."""
        self.cache.begin(bucket.metadata, None)
        return self._forward(bucket.ids, bucket.positions, None)

    def _forward(self, ids: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
        """Logits [T, V], or of the rows `keep`, for ids and positions [1, T]."""
        kwargs: dict[str, Any] = dict(self._logits_only)
        if keep is not None and self._keeps:
            kwargs["logits_to_keep"] = keep
        with packed_attention(self.model) as eager, self._linears:
            out = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self.cache.mask(self.model.dtype, eager),
                past_key_values=self.cache,
                use_cache=True,
                **kwargs,
            )
        logits: Tensor = out.logits[0]
        return logits if keep is None or self._keeps else logits[keep]

    def _bind(self, batch: Batch) -> None:
        """Metadata over the arrays of a batch; on a CPU they are shared, not copied."""
        kept = batch is self._batch and batch.revision == self._revision
        if not kept or self.device.type != "cpu":
            seq_lens = torch.from_numpy(batch.seq_lens).to(self.device)
            cu_seqlens_q = torch.from_numpy(batch.cu_seqlens_q).to(self.device)
            self._metadata = [
                AttentionMetadata(
                    torch.from_numpy(table).to(self.device),
                    seq_lens,
                    cu_seqlens_q,
                    batch.max_seqlen_q,
                    torch.from_numpy(slots).to(self.device),
                )
                for table, slots in zip(batch.block_tables, batch.slot_mappings, strict=True)
            ]
            self._batch, self._revision = batch, batch.revision
        for metadata in self._metadata:
            metadata.max_seqlen_q = batch.max_seqlen_q

    def _probe(self) -> None:
        """Open the pool, and see that a packed forward gives what single ones give.

        The model runs three times on a few tokens: with its masks observed; as it is, which also
        tells the shapes of its keys; and packed. A model whose code looks at positions or
        neighbours of its own accord fails here.
        """
        ids = np.arange(1, max(map(max, PROBE_LENGTHS)) + 1, dtype=np.int64) % self.vocabulary
        config = self.model.config.get_text_config(decoder=True)
        tokens = torch.from_numpy(ids)[None].to(self.device)
        stock = DynamicCache(config=config)
        with observed(self.model) as reaches:
            self._alone(tokens, DynamicCache(config=config))
        self._check_reaches(reaches)
        logits = self._alone(tokens, stock)
        paged = [stock.layers[index] for index in self.cache.paged]
        shapes = [(layer.keys, layer.values) for layer in paged]
        if any(k is None or k.dim() != 4 or v.dim() != 4 for k, v in shapes):
            raise ValueError(f"{self._name} cannot be packed: a layer caches nothing")
        self.cache.open(shapes)
        size = self.cache.pool.block_size
        for lengths in PROBE_LENGTHS:
            blocks = sum(-(-length // size) for length in lengths) * len(self.cache.windows)
            if blocks <= self.cache.pool.num_blocks:
                self._compare(ids, np.array(lengths, np.int64), logits)
                return

    def _alone(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [T, V] of one text [1, T], as the model gives them by itself."""
        kwargs = {"past_key_values": cache, "use_cache": True, **self._logits_only}
        with self._explained("its forward fails on text alone"):
            logits: Tensor = self.model(input_ids=tokens, **kwargs).logits[0]
        return logits

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Say that the model cannot be packed where its own code raises; memory may be short."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            begin, reason = f"{self._name} cannot be packed: ", str(error).partition("\n")[0]
            if isinstance(error, ValueError) and reason.startswith(begin):
                raise
            raise ValueError(f"{begin}{what} ({type(error).__name__}: {reason})") from error

    def _check_reaches(self, reaches: Reaches) -> None:
        """Layers must keep what the masks of the model show; a short text could not tell."""
        for index in self.cache.paged:
            layer, shown = self.cache.layers[index], reaches.get(index)
            kept = layer.window or layer.chunk
            if shown == kept or (shown is None and not kept):
                continue
            if shown == LATER:
                raise self.cache.refusal(f"layer {index} {SEES_LATER}")
            mask = "its mask is not known"
            if shown is not None:
                mask = f"its mask shows {shown} tokens" if shown else "its mask shows all tokens"
            window = f"a window of {kept} tokens" if kept else "all tokens"
            raise ValueError(
                f"{self._name} cannot be packed: layer {index} caches {window}, but {mask}"
            )

    def _compare(self, ids: Int64Array, lengths: Int64Array, expected: Tensor) -> None:
        """Pack texts that begin with `ids`; their last logits must be those in expected [T, V]."""
        allocator = self.cache.pool.allocator
        assert allocator is not None
        seqs = allocator.allocate([0] * len(lengths))
        try:
            batch = allocator.batch(seqs, windows=self.cache.windows, chunks=self.cache.chunks)
            copies = batch.step(lengths)
            step = Step(seqs, 0 * lengths, lengths, np.ones_like(lengths), batch, copies)
            with self._explained("its forward fails on a packed cache"):
                packed = self.run(step, np.concatenate([ids[:length] for length in lengths]))
        finally:
            allocator.free(seqs)
        wanted = expected[torch.from_numpy(lengths - 1).to(expected.device)]
        cosine = torch.nn.functional.cosine_similarity(packed.float(), wanted.float())
        if not bool((cosine > SAME_DIRECTION).all()):
            raise ValueError(
                f"{self._name} cannot be packed: its logits change when requests share a forward "
                f"(cosine {float(cosine.min()):.2f})"
            )

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def check_packable(model: Any) -> None:
    """Raise unless requests can go through the model as one packed sequence.

    Raises:
        TypeError: not a transformers model. ValueError: it cannot; the message says why.
    """
    check_model(model)
    name = type(model).__name__
    if model.training:
        raise ValueError(f"{name} is in training mode; call model.eval() first")
    reason = None
    if any(parameter.is_meta for parameter in model.parameters()):
        reason = "it has parameters without values, on the meta device"
    elif model.config.is_encoder_decoder:
        reason = "it has an encoder"
    elif not model.can_generate():
        reason = "it does not generate"
    elif not model._can_set_attn_implementation():
        reason = "its attention is its own code, not an implementation that can be chosen"
    elif getattr(type(model), "_sample", None) not in (None, GenerationMixin._sample):
        reason = "its generate chooses tokens in a way of its own"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        reason = "its forward takes no position_ids"
    elif not isinstance(vocabulary_of(model), int):
        reason = "its input embeddings do not say how many tokens they know"
    if reason is not None:
        raise ValueError(f"{name} cannot be packed: {reason}")


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Tokens that the embedding knows at present; None: it does not say."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def logits_only(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments with which a forward gives logits and nothing else, whatever its config says.

    Losses of experts over the packed mask would be wrong, and hidden states of all layers large.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in LOGITS_ONLY.items() if takes_any or name in parameters}
