"""Failures leave the engine usable and lose no block; bad arguments change nothing."""

from __future__ import annotations

import copy
import gc
import os
import resource
import signal
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, make_model, randomize
from workload import (
    NEW_TOKENS,
    assert_empty,
    expected,
    make_engine,
    make_prompts,
    one_by_one,
    random_prompt,
)

import pykvcache
from pykvcache import Sampling
from pykvcache.engine.graphs import DecodeGraphs


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 3, 8])
@pytest.mark.parametrize("place", ["model", "sampler", "copy", "record"])
def test_errors_anywhere_in_a_step(
    error: type[BaseException], call: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(token_budget=24)
    owner, name = {
        "model": (engine._runner, "_forward"),
        "sampler": (engine._loop._sampler, "choose"),
        "copy": (engine._runner, "copy_blocks"),
        "record": (engine._blocks, "record"),
    }[place]
    original, calls = getattr(owner, name), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call + 1:
            raise error("on purpose")
        return original(*args)

    monkeypatch.setattr(owner, name, failing)
    handles = [engine.submit(p, max_new_tokens=NEW_TOKENS) for p in make_prompts()]
    failed = 0
    while not all(handle.done for handle in handles):
        try:
            engine.step()
        except error:
            failed += 1
    assert failed == (calls[0] > call)
    assert [handle.outputs[0].token_ids for handle in handles] == expected("llama")
    assert_empty(engine)


@pytest.mark.parametrize("call", [0, 2, 5])
def test_generate_and_score_leave_nothing_behind(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(token_budget=8)
    original, calls = engine._runner._forward, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % (call + 1) == 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(engine._runner, "_forward", failing)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert_empty(engine)
    with pytest.raises(KeyboardInterrupt):
        engine.score(random_prompt(40, 1), make_prompts())
    assert_empty(engine)
    monkeypatch.undo()
    outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
    assert [output.token_ids for output in outputs] == expected("llama")


def test_errors_in_callbacks_come_out_and_harm_nobody() -> None:
    engine = make_engine()
    heard: list[int | None] = []

    def complain(event: Any) -> None:
        raise ValueError("from the callback")

    first = engine.submit(make_prompts()[0], max_new_tokens=3, on_token=complain)
    second = engine.submit(
        make_prompts()[1], max_new_tokens=3, on_token=lambda event: heard.append(event.token_id)
    )
    errors = 0
    while not (first.done and second.done):
        try:
            engine.step()
        except ValueError:
            errors += 1
    assert errors == 3 and heard == expected("llama")[1][:3]
    assert first.outputs[0].token_ids == expected("llama")[0][:3]
    assert_empty(engine)


def test_ten_thousand_short_requests_take_no_more_memory() -> None:
    engine = make_engine(num_blocks=300, max_running=64)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> None:
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
        engine.generate(prompts, Sampling(max_new_tokens=1))

    some(2000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    objects = len(gc.get_objects())
    for _ in range(8):
        some(1000)
    gc.collect()
    assert len(gc.get_objects()) < objects + 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000  # KiB
    assert not engine._blocks._twins
    assert_empty(engine)


@pytest.mark.parametrize("graphs", [False, True])
def test_the_pool_goes_with_its_engine(graphs: bool) -> None:
    engine = make_engine()
    if graphs:
        runner = engine._runner
        runner.graphs = DecodeGraphs(
            runner._forward_bucket, 1, torch.device("cpu"), 8, lambda run: (run, run())
        )
    engine.generate(make_prompts(), max_new_tokens=3)
    if runner_graphs := engine._runner.graphs:
        assert runner_graphs.captures
        runner_graphs.clear()  # this recorder keeps what it recorded
    pool = weakref.ref(engine.pool)
    gc.collect()
    gc.disable()
    try:
        del engine, runner_graphs
        if graphs:
            del runner
        assert pool() is None
    finally:
        gc.enable()


def test_memory_is_a_bound() -> None:
    for family in ("llama", "gemma3", "llama4"):
        engine = make_engine(family, num_blocks=None, memory="64KiB")
        assert 0 < engine.pool.allocated_bytes <= 64 * 1024
        assert engine.pool.allocated_bytes + engine.pool.block_bytes > 64 * 1024
        engine.generate(make_prompts()[:3], max_new_tokens=4)


def test_nobody_starves() -> None:
    """A stream of newer and more important requests cannot hold back an old one for ever."""
    engine = make_engine(num_blocks=12, max_running=2, token_budget=8)
    object.__setattr__(engine._scheduler.options, "patience", 5)
    old = engine.submit(make_prompts()[0], max_new_tokens=4, priority=0)
    for count in range(200):
        engine.submit(random_prompt(6, count), max_new_tokens=4, priority=3)
        engine.submit(random_prompt(6, count + 500), max_new_tokens=4, priority=3)
        engine.step()
        if old.done:
            break
    assert old.done
    assert old.outputs[0].token_ids == expected("llama")[0][:4]


def test_priority_comes_first() -> None:
    engine = make_engine(max_running=1)
    low = engine.submit(make_prompts()[0], max_new_tokens=2)
    high = engine.submit(make_prompts()[1], max_new_tokens=2, priority=1)
    while not high.done:
        engine.step()
    assert not low.done
    assert low.result()[0].token_ids == expected("llama")[0][:2]


def other_rotary(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    return type(model.model.rotary_emb)(config)


def test_changed_weights_are_noticed() -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    weight = model.model.layers[0].self_attn.v_proj.weight
    changes: dict[str, Any] = {
        "in place": lambda: weight.mul_(1.5),
        "through data": lambda: weight.data.mul_(-1),
        "replaced": lambda: setattr(weight, "data", weight.data + 1),
        "other frequencies": lambda: model.model.rotary_emb.inv_freq.mul_(0.25),
        "other rotary module": lambda: setattr(model.model, "rotary_emb", other_rotary(model)),
        "loaded": lambda: model.load_state_dict(make_model("llama").state_dict()),
    }
    for name, change in changes.items():
        assert engine.generate([prompt], max_new_tokens=8)[0].token_ids == one_by_one(
            model, prompt, 8
        )
        again = engine.generate([prompt], max_new_tokens=8)[0]
        assert again.cached_tokens == len(prompt) - 1
        with torch.no_grad():
            change()
        output = engine.generate([prompt], max_new_tokens=8)[0]
        assert output.token_ids == one_by_one(model, prompt, 8), name
        assert output.cached_tokens == 0, name


def test_weights_that_change_between_submit_and_step_are_noticed() -> None:
    model = copy.deepcopy(make_model("llama"))
    other = {name: value * 1.3 for name, value in make_model("llama").state_dict().items()}
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4, token_budget=8)
    prompt = make_prompts()[4]
    engine.generate([prompt], max_new_tokens=4)
    handle = engine.submit(prompt, max_new_tokens=8)
    model.load_state_dict(other)
    output = handle.result()[0]
    assert (output.token_ids, output.cached_tokens) == (one_by_one(model, prompt, 8), 0)
    engine.submit(prompt, max_new_tokens=8)  # begins under these weights
    engine.step()
    engine.step()
    model.load_state_dict(make_model("llama").state_dict())
    late = engine.submit(prompt, max_new_tokens=8).result()[0]
    assert (late.token_ids, late.cached_tokens) == (one_by_one(model, prompt, 8), 0)


def test_weights_that_changed_for_a_while_leave_nothing_behind() -> None:
    """Only one request runs, nobody waits, and the weights are the old ones when one comes."""
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    weight = model.model.layers[0].self_attn.v_proj.weight
    handle = engine.submit(make_prompts()[4], max_new_tokens=30)
    engine.step()
    before = weight.data
    weight.data = before * -2
    for _ in range(20):
        engine.step()
    weight.data = before
    text = make_prompts()[4] + handle.result()[0].token_ids
    output = engine.generate([text], max_new_tokens=4)[0]
    fresh = pykvcache.Engine(model, num_blocks=200, block_size=4)
    again = fresh.generate([text], max_new_tokens=4)[0]
    assert (output.token_ids, output.cached_tokens) == (again.token_ids, 0)


@pytest.mark.parametrize("place", ["look", "forget", "accept"])
def test_an_interrupt_while_weights_are_compared_is_no_way_to_stale_blocks(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(make_model("llama"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    engine.generate([prompt], max_new_tokens=2)
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1)
    owner: Any
    owner, name = {
        "look": (engine._guard, "changed"),
        "forget": (engine._blocks, "forget"),
        "accept": (engine._guard, "accept"),
    }[place]

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt], max_new_tokens=8)
    monkeypatch.undo()
    output = engine.generate([prompt], max_new_tokens=8)[0]
    assert (output.token_ids, output.cached_tokens) == (one_by_one(model, prompt, 8), 0)


def test_a_model_in_training_mode_runs_no_step() -> None:
    model = copy.deepcopy(make_model("gpt2"))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompt = make_prompts()[4]
    handle = engine.submit(prompt, max_new_tokens=NEW_TOKENS)
    for _ in range(3):
        engine.step()
    model.train()
    for call in (engine.step, lambda: engine.generate([prompt]), lambda: engine.score([1], [[2]])):
        with pytest.raises(ValueError, match=r"is in training mode; call model.eval\(\) first"):
            call()
    model.eval()
    assert handle.result()[0].token_ids == expected("gpt2")[4]
    assert handle.outputs[0].preemptions == 0
    assert_empty(engine)
    model.train()
    assert engine.step() == []  # nothing to do


def test_rotary_embeddings_that_look_at_the_whole_forward_bound_a_request() -> None:
    config = transformers.Phi3Config(
        **DECODER,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
    )
    model = randomize(transformers.Phi3ForCausalLM(config))
    engine = pykvcache.Engine(model, num_blocks=200, block_size=4)
    prompts = [random_prompt(n, n) for n in (5, 22)]
    for _ in range(2):
        outputs = engine.generate(prompts, max_new_tokens=10)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.token_ids == one_by_one(model, prompt)
    assert outputs[1].cached_tokens == 21  # these embeddings write a buffer in every forward
    with pytest.raises(ValueError, match="longer than the 32 positions of the original range"):
        engine.generate([random_prompt(30, 1)], max_new_tokens=4)


def test_an_interrupt_inside_the_planner_or_the_end_of_a_request_loses_nothing() -> None:
    """A real SIGINT; it is handled when the requests are in order again."""
    for name in ("plan", "finish"):
        engine = make_engine()
        scheduler = engine._scheduler
        original = getattr(scheduler, name)

        def interrupting(*args: Any, original: Any = original) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return original(*args)

        setattr(scheduler, name, interrupting)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
        delattr(scheduler, name)
        assert_empty(engine)
        outputs = engine.generate(make_prompts(), max_new_tokens=NEW_TOKENS)
        assert [output.token_ids for output in outputs] == expected("llama")


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_tiny_pools_serve_what_fits(num_blocks: int) -> None:
    engine = make_engine(num_blocks=num_blocks)
    prompt = make_prompts()[2]
    output = engine.generate([prompt], max_new_tokens=min(4 * num_blocks, NEW_TOKENS))[0]
    assert output.token_ids == expected("llama")[2][: 4 * num_blocks]


def test_salts_keep_prefixes_apart() -> None:
    engine = make_engine()
    prompt = make_prompts()[4]
    cached = [
        engine.generate([prompt], max_new_tokens=2, salt=salt)[0].cached_tokens
        for salt in (0, 0, 1, 1, 2, 0)
    ]
    most = len(prompt) - 1
    assert cached == [0, most, 0, most, 0, most]


@pytest.mark.parametrize("family", ["gemma2", "mistral", "llama"])
def test_two_engines_share_a_model_in_two_threads(family: str) -> None:
    model = copy.deepcopy(make_model(family))
    if family != "mistral":
        model.set_attn_implementation("eager")
    before = model.config._attn_implementation
    prompts, wanted = make_prompts()[:5], expected(family)[:5]
    failures: list[object] = []

    def work() -> None:
        try:
            engine = pykvcache.Engine(model, num_blocks=200, block_size=4, token_budget=16)
            while time.perf_counter() < end:
                outputs = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
                assert [output.token_ids for output in outputs] == wanted
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        end = time.perf_counter() + 0.7
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        while time.perf_counter() < end:  # the model stays usable on its own
            assert one_by_one(model, prompts[0]) == wanted[0]
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert model.config._attn_implementation == before


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
    "completions must be a list": lambda e: e.score([1], None),
    "priority must be within": lambda e: e.submit([1], priority=10**17),
    "salt must fit 64 bits": lambda e: e.submit([1], salt=2**63),
    "on_token must be callable": lambda e: e.submit([1], on_token=5),
    "sampling or max_new_tokens": lambda e: e.generate([[1]], Sampling(), max_new_tokens=3),
    "max_new_tokens must be at least 1, got 0": lambda e: e.generate([[1]], max_new_tokens=0),
    "priority must be an int": lambda e: e.generate([[1]], priority="high"),
    "top_k must be an int of at least 0, got -1": lambda e: e.score([1], [[2]], top_k=-1),
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
        ({"temperature": -1}, "temperature must be 0 to 1e\\+06, got -1"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be 0 to 1, got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"logprobs": -1}, "logprobs must be at least 0"),
        ({"seed": "x"}, "seed must be an int"),
        ({"stop": "word"}, "stop must be a list"),
        ({"stop": 5}, "stop must be a list"),
        ({"processors": [5]}, "processors must be callable"),
        ({"stop": [[]]}, "stop must not hold an empty list"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens is 9 but max_new_tokens 3"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(**arguments)


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
