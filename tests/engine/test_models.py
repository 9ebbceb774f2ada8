"""Models whose configuration asks for more than logits, grow or shrink, or cannot be served."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODER, make_model
from transformers import CsmConfig, CsmForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from workload import assert_empty, expected, make_engine, make_prompts, one_by_one

import pykvcache
from pykvcache import Sampling


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe"])
@pytest.mark.parametrize("before", [True, False])
def test_losses_of_experts_are_not_computed(family: str, before: bool) -> None:
    model = copy.deepcopy(make_model(family))
    model.config.output_router_logits = before
    engine = pykvcache.Engine(model, block_size=4, num_blocks=200)
    model.config.output_router_logits = True
    outputs = engine.generate(make_prompts(), max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected(family)
    assert_empty(engine)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_else_a_config_asks_for_is_not_returned(name: str) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.set_attn_implementation("eager")
    setattr(model.config, name, True)
    returned: list[Any] = []
    model.register_forward_hook(lambda *call: returned.append(call[-1]))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=200)
    outputs = engine.generate(make_prompts(), max_new_tokens=10)
    assert [output.token_ids for output in outputs] == expected("llama")
    assert returned and {tuple(out.keys()) for out in returned} == {("logits", "past_key_values")}


class NeedsImages(LlamaForCausalLM):
    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        raise ValueError("You have to specify either `pixel_values` or `image_embeds`.\nOr both.")


class ShortOfMemory(LlamaForCausalLM):
    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no room")


class SpeaksCodes(LlamaForCausalLM):
    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


class HasNoSize(LlamaForCausalLM):
    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.norm


REFUSED = {
    NeedsImages: "its forward fails on text alone (ValueError: You have to specify either "
    "`pixel_values` or `image_embeds`.)",
    SpeaksCodes: "its generate chooses tokens in a way of its own",
    HasNoSize: "its input embeddings do not say how many tokens they know",
}


def refusal(model: Any) -> str:
    with pytest.raises(ValueError) as error:
        pykvcache.Engine(model.eval(), num_blocks=9)
    return str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_do_not_continue_texts_are_named(kind: Any) -> None:
    message = refusal(kind(LlamaConfig(**DECODER)))
    assert message == f"{kind.__name__} cannot be packed: {REFUSED[kind]}"


def test_a_model_of_transformers_that_speaks_codes_is_named() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    depth = {**sizes, "backbone_hidden_size": 32}
    model = CsmForConditionalGeneration(CsmConfig(**sizes, depth_decoder_config=depth))
    assert re.match("CsmForConditionalGeneration cannot be packed: its generate", refusal(model))


def test_short_memory_is_not_the_models_fault() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        pykvcache.Engine(ShortOfMemory(LlamaConfig(**DECODER)).eval(), num_blocks=9)


def test_tokens_are_checked_against_the_vocabulary_of_the_moment() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, block_size=4, num_blocks=100)
    for size, last in ((130, 129), (60, 59)):
        model.resize_token_embeddings(size)
        prompt = [5, last, 6]
        outputs = engine.generate([prompt], Sampling(max_new_tokens=10, stop=[[last] * 11]))
        assert outputs[0].token_ids == one_by_one(model, prompt)
        for call in (
            lambda: engine.generate([[size]]),  # noqa: B023
            lambda: engine.score([5], [[size]]),  # noqa: B023
            lambda: engine.submit([5], Sampling(stop=[size])),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"must be 0 to {last}, got {size}"):
                call()
    assert_empty(engine)


def test_integers_may_come_from_numpy() -> None:
    counts = {"block_size": 4, "token_budget": 7, "max_running": 3, "swap_memory": 10**6}
    for pool in ({"num_blocks": 50}, {"num_blocks": None, "memory": 10**6}):
        given = {k: v if v is None else np.int64(v) for k, v in {**counts, **pool}.items()}
        engine = make_engine(**given, head_room=np.float32(0.25))
        plain = make_engine(**counts, **pool)
        assert engine.pool.num_blocks == plain.pool.num_blocks
        for value in (engine.pool.block_size, engine.pool.num_blocks):
            assert type(value) is int
        outputs = engine.generate(make_prompts(), max_new_tokens=10)
        assert [output.token_ids for output in outputs] == expected("llama")
    with pytest.raises(TypeError, match="num_blocks must be an int, got"):
        make_engine(num_blocks=np.bool_(True))
    with pytest.raises(ValueError, match="max_running must be at least 1, got 0"):
        make_engine(max_running=np.int32(0))
