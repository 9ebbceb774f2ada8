"""`Engine`: many requests through one unmodified model, in process.

A step is: plan (scheduler), forward (runner), choose tokens (sampler), settle. Requests join and
leave at every step; nothing waits for a batch to end.

Read first: scheduler.py, runner.py, sampler.py.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from transformers import PreTrainedModel

from pykvcache.engine.blocks import RequestBlocks
from pykvcache.engine.config import ConfigRules
from pykvcache.engine.fresh import Freshness, FreshScheduler
from pykvcache.engine.guard import WeightsGuard
from pykvcache.engine.handle import Call, Handle, Sample, Stream, raise_errors
from pykvcache.engine.inputs import Inputs, Prompt, parse_settings
from pykvcache.engine.interrupts import Shield, uninterrupted
from pykvcache.engine.limits import check_switches, default_memory, eos_tokens, max_length
from pykvcache.engine.loop import Loop
from pykvcache.engine.progress import progress_bar
from pykvcache.engine.runner import ModelRunner
from pykvcache.engine.sampling import Event, Output, Sampling, Score
from pykvcache.engine.scoring import Scorer
from pykvcache.engine.stats import EngineStats, Meter
from pykvcache.engine.step import Options
from pykvcache.engine.swap import SwapSpace
from pykvcache.hf.arguments import parse_dtype, parse_memory


class Engine:
    """Continuous batching for a transformers causal LM.

    Args:
        model: decoder-only; used as it is, on its device. It stays usable on its own.
        block_size: tokens a block.
        num_blocks: blocks of the pool.
        memory: the pool's size in bytes or as "4GiB", instead of num_blocks; it is not exceeded.
            Without both: 85 % of the free memory of a GPU, on a CPU 4 GiB or a quarter of what is
            free.
        kv_dtype: "auto" (the model's), or a float dtype or its name. "float8_e4m3fn" takes half the
            memory of 16 bits: keys and values are rounded to 3 bits after the leading one, each
            head's vector in units of its own largest number.
        backend: "auto" or a name from `ops.backends()`.
        deterministic: a row's bits do not depend on the other rows in attention.
        prefix_cache: requests reuse the blocks of earlier ones that began with the same tokens.
        token_budget: most tokens of a step, prompts in chunks included.
        max_running: most requests that run at once.
        head_room: share of the pool kept free for running requests when one is admitted.
        swap_memory: host memory for blocks of preempted requests, in bytes or as "4GiB"; used where
            moving them is cheaper than computing them again. Default: 4 GiB with a GPU, else 0.
        cuda_graphs: on a GPU, replay decode steps as CUDA graphs where the model allows it.

    Raises:
        ValueError, TypeError: an argument is out of range, or the model cannot be packed.
        RuntimeError: the backend cannot be used here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        block_size: int = 16,
        num_blocks: int | None = None,
        memory: int | str | None = None,
        *,
        kv_dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        deterministic: bool = False,
        prefix_cache: bool = True,
        token_budget: int = 2048,
        max_running: int = 256,
        head_room: float = 0.05,
        swap_memory: int | str | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        options = Options(token_budget, max_running, head_room)
        check_switches(
            deterministic=deterministic, prefix_cache=prefix_cache, cuda_graphs=cuda_graphs
        )
        size, limit = parse_memory(memory), parse_memory(swap_memory, "swap_memory")
        if limit is not None and limit < 0:
            raise ValueError(f"swap_memory must be at least 0, got {limit}")
        if size is None and num_blocks is None:
            size = default_memory(getattr(model, "device", torch.device("cpu")))
        self._runner = ModelRunner(
            model,
            options.max_running,
            cuda_graphs,
            block_size=block_size,
            num_blocks=num_blocks,
            memory=size,
            kv_dtype=parse_dtype(kv_dtype),
            backend=backend,
            deterministic=deterministic,
            prefix_cache=prefix_cache,
        )
        runner, cache = self._runner, self._runner.cache
        self.pool = cache.pool
        assert self.pool.allocator is not None
        self._allocator = self.pool.allocator
        self._blocks = RequestBlocks(self._allocator, cache.windows, cache.chunks, prefix_cache)
        if limit is None:
            limit = 4 * 2**30 if self.pool.device.type == "cuda" else 0
        self._swap = SwapSpace(self.pool, self._blocks, limit)
        self._model, self._guard = model, WeightsGuard(model)
        self._freshness = Freshness(self._guard, self._blocks, self._runner)
        self._scheduler = FreshScheduler(
            self._freshness,
            self._blocks,
            options,
            self._swap.take if limit else None,
            self._swap.restore,
            self._swap.drop,
            self._swap.compute_seconds,
        )
        self._loop = Loop(self._runner, self._scheduler, self._swap, eos_tokens(model))
        self._ignored: tuple[str, ...] = ()  # fields of the generation config, as was said
        self._unchecked = False  # a request came since the weights were looked at
        self._inputs = Inputs(lambda: runner.vocabulary, max_length(model))
        self._lock = threading.RLock()
        self._dropped: deque[Handle] = deque()  # to be cancelled

    # Ways to use it.

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_new_tokens: int | None = None,
        priority: int = 0,
        salt: int = 0,
        progress: bool | None = None,
    ) -> list[Output]:
        """Complete all prompts.

        Args:
            prompts: token ids of each, as lists or 1-D tensors.
            sampling: one for all prompts or one for each; default greedy.
            max_new_tokens: for all, instead of `sampling`.
            priority: larger is served earlier.
            salt: prompts of other salts never share cached blocks with these.
            progress: show a bar; None = if standard error is a terminal.

        Returns:
            Outputs in the order of the prompts; with n samples, n one after the other.

        Raises:
            ValueError, TypeError: a prompt or setting is out of range, or a request could never fit
                the pool; nothing was started.
            Exception: what a processor of one of these requests raised.
        """
        if progress is not None and not isinstance(progress, bool):
            raise TypeError(f"progress must be True, False or None, got {progress!r}")
        settings = parse_settings(prompts, sampling, max_new_tokens)
        total, call = sum(setting.n for setting in settings), Call()
        handles = self._handles(prompts, settings, priority, salt, call)
        with uninterrupted() as shield:
            try:
                shield.open = True
                self._queue(handles)
                with progress_bar(total, progress) as advance:
                    while call.ended < total:
                        before = call.ended
                        self._advance(())
                        advance(call.ended - before, self._loop.meter.rate)
            finally:
                shield.open = False
                self._cancel(handles, ())
        outputs = [output for handle in handles for output in handle.outputs]
        raise_errors(outputs)
        return outputs

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_new_tokens: int | None = None,
        priority: int = 0,
        salt: int = 0,
    ) -> Stream:
        """Complete all prompts and give every token as it comes; arguments as `generate`.

        The requests are queued at once; leaving the stream cancels those that have not ended.
        """
        settings = parse_settings(prompts, sampling, max_new_tokens)
        call = Call(streams=True)
        handles = self._handles(prompts, settings, priority, salt, call)
        stream = Stream(self, handles, call)  # before they are queued: nobody else has them
        try:
            self._queue(handles)
            return stream
        except BaseException:
            self._cancel(handles, ())
            raise

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int | None = None,
        priority: int = 0,
        salt: int = 0,
        on_token: Callable[[Event], None] | None = None,
    ) -> Handle:
        """Put one prompt into the queue; it advances with every `step`.

        Args:
            prompt, sampling, max_new_tokens, priority, salt: as in `generate`.
            on_token: called with every event of this request, in order and never inside of
                another callback, when the engine has done its step; it may use the engine. What
                it raises comes out of the `step` that called it, which counts as done, or, when
                `generate` and the like of others run the engine, out of its `Handle.result`.
        """
        if on_token is not None and not callable(on_token):
            raise TypeError(f"on_token must be callable, got {on_token!r}")
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, got {sampling!r:.60}")
        settings = parse_settings([prompt], sampling, max_new_tokens)
        handles = self._handles([prompt], settings, priority, salt, Call(), on_token)
        try:
            self._queue(handles)
            return handles[0]
        except BaseException:
            self._cancel(handles, ())
            raise

    def score(
        self,
        prompt: Prompt,
        completions: Sequence[Prompt],
        top_k: int = 0,
        *,
        salt: int = 0,
    ) -> list[Score]:
        """Log-probabilities of completions of a prompt, whose blocks they share.

        Args:
            prompt: token ids, at least one.
            completions: token ids of each, at least one.
            top_k: report so many most likely tokens of each position, too.

        Returns:
            One `Score` for each completion.
        """
        if isinstance(completions, (str, bytes)) or not hasattr(completions, "__len__"):
            raise TypeError(
                f"completions must be a list of token ids each, got {completions!r:.60}"
            )
        if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 0:
            raise ValueError(f"top_k must be an int of at least 0, got {top_k!r}")
        first = self._inputs.token_ids(prompt, "prompt")
        endings = [
            self._inputs.token_ids(c, f"completions[{i}]") for i, c in enumerate(completions)
        ]
        with self._lock:
            self._accept()
        new_request = functools.partial(self._inputs.request, new_tokens=1, priority=0, salt=salt)
        scorer = Scorer(self._scheduler, self._lock, lambda: self._advance(()), new_request)
        return scorer.score(first, endings, int(top_k))

    def step(self) -> list[Event]:
        """Run one step; returns the events of watched requests. Nothing to do: an empty list.

        Callbacks are called at the end. Inside of one, the events of this step follow later.

        Raises:
            RuntimeError: a processor or a hook of the model calls it; nothing was changed.
            Exception: what the callback of any request raised; the step counts as done.
        """
        return self._advance(None)

    def _advance(self, own: Sequence[Handle] | None) -> list[Event]:
        """Run one step for those who have these handles, see `_deliver`."""
        self._loop.check_outside()
        with uninterrupted() as shield:
            try:
                with shield.holding(self._lock):
                    return self._step(shield)
            finally:
                self._deliver(shield, own)

    def _deliver(self, shield: Shield, own: Sequence[Handle] | None) -> None:
        """Call the callbacks; what those of `own` raise comes out, None: what any of them raises.

        Others have nothing to do with the call that runs: their errors wait for `Handle.result`.
        """
        mine: list[tuple[Handle, Exception]] = []
        others: list[Exception] = []

        def note(handle: Handle, error: Exception) -> None:
            if own is None or handle in own:
                mine.append((handle, error))
            else:
                handle.error = handle.error or error
                others.append(error)

        try:
            self._loop.delivery.deliver(shield, note)
        except BaseException:
            for handle, error in mine:  # which the interrupt comes before
                handle.error = handle.error or error
            raise
        finally:
            for error in others:
                text = f"a callback of another request raised {error!r}; its result() raises it"
                warnings.warn(text, RuntimeWarning, stacklevel=4)
        if mine:
            raise mine[0][1]

    def _step(self, shield: Shield) -> list[Event]:
        self._cancel_dropped()
        try:
            self._check_weights()
            return self._loop.step(shield)
        finally:
            self._cancel_dropped()  # what asked for it meanwhile

    def weights_changed(self) -> None:
        """Share nothing that was computed so far; a change of weights that is noticed does it."""
        with self._lock:
            self._freshness.forget()

    def stats(self) -> EngineStats:
        """What happened since the start, and where the pool's slots are now."""
        self._cancel((), ())  # those that were dropped
        with self._lock:
            return self._loop.meter.stats(self._scheduler, self._allocator, self._swap)

    def reset_stats(self) -> None:
        """Start counting and timing anew."""
        with self._lock:
            self._loop.meter = Meter(self._scheduler)

    # Submitting.

    def _handles(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[Sampling],
        priority: int,
        salt: int,
        call: Call,
        on_token: Callable[[Event], None] | None = None,
    ) -> list[Handle]:
        """Handles of prompts that were checked and are not yet in the queue."""
        handles: list[Handle] = []
        for index, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
            array = self._inputs.token_ids(prompt, f"prompts[{index}]")
            self._inputs.check_stop(setting)
            handle = Handle(self, call)
            for sample_index in range(setting.n):
                request = self._inputs.request(array, setting.max_new_tokens, priority, salt)
                self._scheduler.check(request)
                sample = Sample(
                    handle, request, setting, index, sample_index, on_token, call.streams
                )
                request.owner, request.ends_at_eos = sample, not setting.ignore_eos
                handle.samples.append(sample)
            handles.append(handle)
        return handles

    def _queue(self, handles: Sequence[Handle]) -> None:
        """Put everything into the queue; Ctrl-C comes before or after that."""
        with uninterrupted(), self._lock:
            self._accept()
            for handle in handles:
                for sample in handle.samples:
                    self._scheduler.submit(sample.request)

    def _accept(self) -> None:
        """New requests come: look at the weights before the next step, and at the configuration."""
        self._unchecked = True
        self._follow_config(stacklevel=5)

    def _follow_config(self, stacklevel: int) -> None:
        """Choose tokens as the generation config says now, among those that the model has now."""
        config, eos = self._model.generation_config, eos_tokens(self._model)
        penalty = getattr(config, "repetition_penalty", None)
        rules = ConfigRules(config, eos, self._runner.vocabulary, self.pool.device)
        if rules.ignored and rules.ignored != self._ignored:
            self._ignored = rules.ignored
            names = ", ".join(rules.ignored)
            text = f"Engine does not follow {names} of the generation config"
            warnings.warn(text, stacklevel=stacklevel)
        self._loop.set_ends(
            eos, 1.0 if penalty is None else penalty, rules if rules.fields else None
        )

    def _check_weights(self) -> None:
        """Before a step: what was computed with other weights must not be shared any more."""
        if self._model.training and (self._scheduler.num_waiting or self._scheduler.num_running):
            raise ValueError(
                f"{type(self._model).__name__} is in training mode; call model.eval() first"
            )
        self._freshness.begin(thorough=self._unchecked)
        self._unchecked = False
        if self._runner.vocabulary != self._loop.vocabulary:
            self._follow_config(stacklevel=7)

    def _cancel(self, handles: Sequence[Handle], own: Sequence[Handle] | None) -> None:
        """End all samples that have not ended, then tell those who watch them, see `_deliver`."""
        with uninterrupted() as shield:
            self._dropped.extend(handles)
            with self._lock:
                self._cancel_dropped()
            if not self._loop.is_inside():  # the step will deliver when it is over
                self._deliver(shield, own)

    def _drop(self, handles: Sequence[Handle]) -> None:
        """Nobody has these handles any more; may be called at any time, by any thread."""
        self._dropped.extend(handles)

    def _cancel_dropped(self) -> None:
        """End what shall be cancelled; inside of a step that waits until it is over."""
        while self._dropped and not self._loop.is_inside():
            for sample in self._dropped.popleft().samples:
                if sample.output is None and sample.request.order:  # it was queued
                    self._loop.end(sample, "cancelled")
