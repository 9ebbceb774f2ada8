"""Requests, engines and settings that are refused, each with one clear error."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from workload import (
    assert_empty,
    expected,
    make_engine,
    make_prompts,
)

import pykvcache
from pykvcache import Sampling

BAD = {
    "prompts must be a list": lambda e: e.generate("text"),
    r"prompts\[0\] must be token ids, got a string": lambda e: e.generate(["text"]),
    r"prompts\[1\] must be a non-empty list": lambda e: e.generate([[1], []]),
    r"prompts\[0\] must be a non-empty list of token ids, got shape \[1, 2\]": lambda e: e.generate(
        [[[1, 2]]]
    ),
    r"prompts\[0\] must be 0 to 96, got 97": lambda e: e.generate([[97]]),
    r"prompts\[0\] must be 0 to 96, got -1": lambda e: e.generate([[-1]]),
    r"prompts\[0\] must be integers, got float": lambda e: e.generate([[1.5]]),
    "sampling has 1 entries for 2 prompts": lambda e: e.generate([[1], [2]], [Sampling()]),
    "sampling must be a Sampling": lambda e: e.generate([[1]], [3]),
    "sampling must be a Sampling or a list of them, got 5": lambda e: e.generate([[1]], 5),
    r"prompts\[0\] must be a list of token ids": lambda e: e.generate([[[1], [2, 3]]]),
    r"sampling must be a Sampling, got \[Sampling": lambda e: e.submit([1], [Sampling()]),
    "ignore_eos must be True or False, got 'no'": lambda e: e.submit(
        [1], Sampling(ignore_eos="no")
    ),
    "completions must be a list": lambda e: e.score([1], None),
    "priority must be within": lambda e: e.submit([1], priority=10**17),
    "salt must fit 64 bits": lambda e: e.submit([1], salt=2**63),
    "on_token must be callable": lambda e: e.submit([1], on_token=5),
    "sampling or max_new_tokens": lambda e: e.generate([[1]], Sampling(), max_new_tokens=3),
    "max_new_tokens must be at least 1, got 0": lambda e: e.generate([[1]], max_new_tokens=0),
    "priority must be an int": lambda e: e.generate([[1]], priority="high"),
    "top_k must be an int of at least 0, got -1": lambda e: e.score([1], [[2]], top_k=-1),
    r"prompts\[0\] must be integers, got float32": lambda e: e.generate(
        [torch.ones(2, requires_grad=True)]
    ),
    r"prompts\[0\] must be a list of token ids, got tensor": lambda e: e.generate(
        [torch.ones(2).to_sparse()]
    ),
    "progress must be True, False or None, got 'maybe'": lambda e: e.generate(
        [[1]], progress="maybe"
    ),
    "stop must be 0 to 96, got 97": lambda e: e.generate([[1]], Sampling(stop=[5, [5, 97]])),
    "salt must be an int, got True": lambda e: e.submit([1], salt=True),
    r"completions\[0\] must be a non-empty": lambda e: e.score([1], [[]]),
    "needs 51 blocks but the pool has 50": lambda e: e.generate([[1] * 5], max_new_tokens=197),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_refused_before_anything_starts(message: str) -> None:
    engine = make_engine(num_blocks=50)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        BAD[message](engine)
    assert "\n" not in str(error.value)
    assert_empty(engine)
    assert engine.generate(make_prompts()[:1], max_new_tokens=2)[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"memory": "1GiB", "num_blocks": 3}, "num_blocks or memory, not both"),
        ({"memory": "lots", "num_blocks": None}, "memory must look like"),
        ({"memory": 100, "num_blocks": None}, "memory must hold at least one block"),
        ({"token_budget": 0}, "token_budget must be at least 1"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"head_room": 1.0}, "head_room must be at least 0 and below 1"),
        ({"head_room": "a"}, "head_room must be a number"),
        ({"max_running": 10**12}, "max_running must be at most 65536"),
        ({"kv_dtype": "int3"}, "kv_dtype must be"),
        ({"backend": "metal"}, "backend"),
        ({"swap_memory": -1}, "swap_memory must be at least 0, got -1"),
        ({"swap_memory": "x"}, "swap_memory must look like '4GiB'"),
        ({"swap_memory": 1.5}, "swap_memory must be bytes as an int"),
        ({"prefix_cache": "no"}, "prefix_cache must be True or False, got 'no'"),
        ({"cuda_graphs": 1}, "cuda_graphs must be True or False, got 1"),
        ({"deterministic": None}, "deterministic must be True or False, got None"),
    ],
)
def test_bad_engines_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make_engine(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [int, tuple, list, torch.tensor])
def test_ends_of_text_may_be_given_in_any_way(kind: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    whole = expected("llama")[4]
    end = whole[3]
    model.generation_config.eos_token_id = end if kind is int else kind([end, 96])
    output = pykvcache.Engine(model, num_blocks=50).generate([make_prompts()[4]])[0]
    assert (output.finish_reason, output.token_ids) == ("eos", whole[: whole.index(end) + 1])


@pytest.mark.parametrize("eos", ["</s>", [1.5], [[1], [2, 3]], [None]])
def test_ends_of_text_that_are_no_tokens_are_refused(eos: Any) -> None:
    model = copy.deepcopy(make_model("llama"))
    model.generation_config.eos_token_id = eos
    with pytest.raises(ValueError, match="eos_token_id of the generation config must be") as error:
        pykvcache.Engine(model, num_blocks=50)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": None}, "n must be an int, got None"),
        ({"max_new_tokens": None}, "max_new_tokens must be an int, got None"),
        ({"temperature": -1}, "temperature must be 0 to 1e\\+06, got -1"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be 0 to 1, got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"logprobs": -1}, "logprobs must be at least 0"),
        ({"seed": "x"}, "seed must be an int"),
        ({"stop": "word"}, "stop must be a list"),
        ({"stop": 5}, "stop must be a list"),
        ({"processors": [5]}, "processors must be callable"),
        ({"stop": [True]}, "stop must hold token ids or lists of them, got True"),
        ({"stop": [[5, False]]}, r"stop must hold token ids or lists of them, got \[5, False\]"),
        ({"stop": [-5]}, "stop must hold token ids of at least 0, got -5"),
        ({"max_new_tokens": np.bool_(True)}, "max_new_tokens must be an int"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"stop": [[]]}, "stop must not hold an empty list"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens is 9 but max_new_tokens 3"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(**arguments)


def test_nothing_may_stop_a_text() -> None:
    assert Sampling(stop=None) == Sampling() and Sampling(stop=None).stop == ()


def test_settings_may_come_from_numpy() -> None:
    setting = Sampling(
        max_new_tokens=np.int64(4), stop=[np.int64(96), [np.int32(95)]], temperature=np.float32(0.5)
    )
    plain = Sampling(max_new_tokens=4, stop=[96, [95]], temperature=0.5)
    assert setting == plain and repr(setting) == repr(plain)
    engine = make_engine()
    one, other = (
        engine.generate([[5, 6]], dataclasses.replace(s, temperature=None))[0].token_ids
        for s in (setting, plain)
    )
    assert one == other
    assert engine.submit([5], priority=np.int64(3), salt=np.int64(4), max_new_tokens=1).result()
    assert len(engine.score([5], [[6]], top_k=np.int64(2))[0].top[0]) == 2
    assert_empty(engine)


@pytest.mark.parametrize("arguments", [{"num_blocks": 10**9}, {"memory": "100000GiB"}])
def test_pools_larger_than_the_machine_are_refused_at_once(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an allocator was made")

    monkeypatch.setattr("pykvcache.cache.BlockAllocator", unexpected)
    (name,) = arguments
    with pytest.raises(MemoryError, match=rf"{name} is too large: \d+ blocks of \d+ bytes"):
        pykvcache.Engine(make_model("llama"), **arguments)


def test_a_pool_whose_bookkeeping_finds_no_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("pykvcache.cache.BlockAllocator", short)
    with pytest.raises(MemoryError, match="num_blocks is too large: no memory for a list of 9"):
        pykvcache.Engine(make_model("llama"), num_blocks=9)


def test_models_without_values_are_refused() -> None:
    model = copy.deepcopy(make_model("llama")).to("meta")
    with pytest.raises(ValueError, match="cannot be packed: it has parameters without values"):
        pykvcache.Engine(model, num_blocks=10)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
def test_a_forward_that_fails_on_packed_keys_is_one_clear_error(kind: type[Exception]) -> None:
    model = copy.deepcopy(make_model("llama"))

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if type(kwargs["past_key_values"]).__name__ == "PackedCache":
            raise kind("not this one\nand more")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    message = rf"Llama.* cannot be packed: .* on a packed cache \({kind.__name__}: .*not this"
    with pytest.raises(ValueError, match=message) as error:
        pykvcache.Engine(model, num_blocks=10)
    assert "and more" not in str(error.value) or kind is KeyError  # whose text is a repr


def test_models_in_training_mode_and_other_objects_are_refused() -> None:
    model = copy.deepcopy(make_model("llama")).train()
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        pykvcache.Engine(model, num_blocks=10)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got int"):
        pykvcache.Engine(3, num_blocks=10)  # type: ignore[arg-type]


def test_learned_positions_bound_a_request() -> None:
    engine = make_engine("gpt2", num_blocks=500)
    with pytest.raises(ValueError, match="longer than the 256 positions of its learned position"):
        engine.generate([[1] * 200], max_new_tokens=58)
    assert len(engine.generate([[1] * 200], max_new_tokens=57)[0].token_ids) == 57


def test_a_compiled_wrapper_is_refused_with_what_to_do() -> None:
    wrapper = torch.compile(make_model("llama"))
    for call in (lambda: pykvcache.Engine(wrapper), lambda: pykvcache.patch(wrapper)):  # type: ignore[arg-type, type-var]
        with pytest.raises(TypeError, match=r"got OptimizedModule; call model\.compile\(\)"):
            call()


def test_a_dtype_that_pools_do_not_hold_is_the_models() -> None:
    model = copy.deepcopy(make_model("llama")).double()
    with pytest.raises(TypeError, match=r"got torch\.float64 from the model: convert it"):
        pykvcache.Engine(model, num_blocks=9)
