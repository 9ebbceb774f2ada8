"""`patch` and `unpatch` while an engine runs the model in another thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
from families import make_model
from transformers import PreTrainedModel

import pykvcache
from pykvcache.hf.attention import SDPA_NAME

PROMPT = [5, 6, 7]


class Held:
    """An engine that waits inside its forward, in another thread, for as long as it is told to."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.engine = pykvcache.Engine(model, num_blocks=20)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.outputs: list[Any] = []
        hook = model.model.layers[0].register_forward_pre_hook(self.wait)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.inside.wait(30)
        hook.remove()

    def wait(self, *args: Any) -> None:
        self.inside.set()
        assert self.go_on.wait(30)

    def run(self) -> None:
        self.outputs += self.engine.generate([PROMPT], max_new_tokens=4)


def meanwhile(held: Held, action: Callable[[], Any]) -> None:
    """Start an action that has to wait for the engine's forward, then let that go on."""
    other = threading.Thread(target=action)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    held.go_on.set()
    for thread in (other, held.thread):
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("patched_before", [False, True])
def test_patching_waits_for_a_forward_of_an_engine(patched_before: bool) -> None:
    model = copy.deepcopy(make_model("llama"))
    own = model.config._attn_implementation
    alone = pykvcache.Engine(model, num_blocks=20).generate([PROMPT], max_new_tokens=4)
    if patched_before:
        pykvcache.patch(model)
    held = Held(model)
    meanwhile(held, lambda: (pykvcache.unpatch if patched_before else pykvcache.patch)(model))
    assert model.config._attn_implementation == (own if patched_before else SDPA_NAME)
    if not patched_before:
        pykvcache.unpatch(model)
    assert model.config._attn_implementation == own
    assert held.outputs[0].token_ids == alone[0].token_ids


def test_the_thread_that_lends_does_not_wait_for_itself() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=20)
    seen: list[bool] = []

    def look(*args: Any) -> None:
        from pykvcache.hf.loans import not_lent

        with not_lent([model.config]):
            seen.append(True)

    model.model.layers[0].register_forward_pre_hook(look)
    engine.generate([PROMPT], max_new_tokens=2)
    assert seen
