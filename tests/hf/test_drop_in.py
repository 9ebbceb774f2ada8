"""What `patch` leaves alone, what it puts back, and which inputs it accepts."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_model
from test_identity import TOLERANCE, assert_same
from transformers import DynamicCache, PreTrainedModel
from ways import NEW_TOKENS, PADS, PROMPT, WAYS, inputs_for

import pykvcache
from pykvcache import ops
from pykvcache.hf import PagedCache, counters
from pykvcache.layer_step import LayerStep


@pytest.fixture
def llama() -> PreTrainedModel:
    """A fresh tiny Llama."""
    return copy.deepcopy(make_model("llama"))


def generate(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """Greedy tokens of the padded batch."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    tokens: torch.Tensor = model.generate(**inputs_for(model), **options)
    return tokens


def test_import_is_light() -> None:
    code = (
        "import sys, pykvcache; print([m for m in ('transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unpatch_restores_everything(llama: PreTrainedModel) -> None:
    def picture() -> tuple[Any, ...]:
        attributes = {k: v for k, v in llama.__dict__.items() if not k.startswith("_")}
        hooks = {k: len(v) for k, v in llama.__dict__.items() if k.endswith("hooks")}
        return sorted(llama.__dict__), attributes, hooks, llama.config._attn_implementation

    before = picture()
    assert pykvcache.patch(llama) is llama
    assert llama.config._attn_implementation == "pykvcache"
    assert pykvcache.unpatch(llama) is llama
    assert picture() == before
    counters.reset()
    generate(llama)
    assert counters.paged == 0


def test_patch_twice(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    assert pykvcache.patch(llama, block_size=4) is llama
    with pytest.raises(ValueError, match="patched with other settings"):
        pykvcache.patch(llama, block_size=8)
    pykvcache.unpatch(llama)
    with pytest.raises(ValueError, match="is not patched"):
        pykvcache.unpatch(llama)


def test_foreign_override_is_kept(llama: PreTrainedModel) -> None:
    calls = []
    original = llama._prepare_cache_for_generation

    def override(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    llama._prepare_cache_for_generation = override
    pykvcache.patch(llama)
    counters.reset()
    generate(llama)
    assert len(calls) == 1
    assert counters.paged > 0
    pykvcache.unpatch(llama)
    assert llama._prepare_cache_for_generation is override


def test_copy_of_a_patched_model_is_patched(llama: PreTrainedModel) -> None:
    expected = generate(llama)
    pykvcache.patch(llama, block_size=4)
    twin = copy.deepcopy(llama)
    pykvcache.unpatch(llama)
    counters.reset()
    assert torch.equal(generate(twin), expected)
    assert counters.paged > 0
    pykvcache.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(generate(twin), expected)


def test_saved_model_knows_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    pykvcache.patch(llama)
    llama.save_pretrained(tmp_path)
    assert "pykvcache" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_training_is_untouched(llama: PreTrainedModel) -> None:
    def gradients() -> list[torch.Tensor]:
        llama.train()
        llama.zero_grad()
        inputs = inputs_for(llama)
        out = llama(**inputs, labels=inputs["input_ids"])
        assert type(out.past_key_values) is DynamicCache
        out.loss.backward()
        return [p.grad.clone() for p in llama.parameters()]

    expected = gradients()
    pykvcache.patch(llama)
    for got, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_backward_through_blocks_is_refused(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache = PagedCache(llama.config)
    out = llama(**inputs_for(llama), past_key_values=cache)
    with pytest.raises(RuntimeError, match="no gradient"):
        out.logits.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "llama4"])
@pytest.mark.parametrize("is_patched", [True, False])
def test_cache_by_hand(family: str, is_patched: bool, backend: str) -> None:
    model = copy.deepcopy(make_model(family))
    expected = generate(model)
    if is_patched:
        pykvcache.patch(model, backend=backend)
    cache = PagedCache(model.config, num_blocks=200, block_size=4, backend=backend)
    assert torch.equal(generate(model, past_key_values=cache), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    cache.reset()
    assert cache.stats()["used_blocks"] == 0
    assert torch.equal(generate(model, past_key_values=cache), expected)


def test_other_caches_pass_through(llama: PreTrainedModel) -> None:
    expected = generate(llama)
    by_hand = DynamicCache(config=llama.config)
    pykvcache.patch(llama)
    counters.reset()
    assert torch.equal(generate(llama, past_key_values=by_hand), expected)
    assert by_hand.get_seq_length() == expected.shape[1] - 1
    assert torch.equal(generate(llama, cache_implementation="static"), expected)
    assert torch.equal(generate(llama, use_cache=False), expected)
    assert counters.paged == 0


def test_padding_is_not_stored(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    out = generate(llama, return_dict_in_generate=True)
    stored = out.past_key_values.stats()["tokens"]
    assert stored == len(PADS) * (PROMPT + NEW_TOKENS - 1) - sum(PADS)


def test_blocks_outside_the_window_are_given_back() -> None:
    model = copy.deepcopy(make_model("mistral"))
    pykvcache.patch(model, block_size=2)
    out = generate(model, return_dict_in_generate=True, max_new_tokens=40)
    stats = out.past_key_values.stats()
    assert stats["used_blocks"] <= len(PADS) * 4
    assert stats["peak_blocks"] <= len(PADS) * (PROMPT + 1)


def test_dropped_copies_free_their_blocks(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    with torch.no_grad():
        cache = llama(**inputs_for(llama)).past_key_values
    allocator = cache.pool.allocator
    twin = copy.deepcopy(cache)
    assert allocator.num_sequences == 2 * len(PADS)
    used = cache.stats()["used_blocks"]
    assert twin.stats()["sharing_factor"] == 2.0
    with torch.no_grad():
        llama(torch.ones(len(PADS), 1, dtype=torch.long), past_key_values=twin)
    assert cache.stats()["used_blocks"] > used
    del twin
    assert allocator.num_sequences == len(PADS)
    assert cache.stats()["used_blocks"] == used
    allocator.check_integrity()


def test_growing_pool(llama: PreTrainedModel) -> None:
    expected = generate(llama, max_new_tokens=60)
    pykvcache.patch(llama)
    cache = PagedCache(llama.config, block_size=1)
    assert torch.equal(generate(llama, past_key_values=cache, max_new_tokens=60), expected)
    assert cache.stats()["num_blocks"] >= len(PADS) * 60


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4", "bloom"])
def test_masks_that_are_not_left_padding(family: str, backend: str) -> None:
    """Right padding, holes, and a 4D mask are stored in full and masked densely."""
    model = copy.deepcopy(make_model(family))
    ids = inputs_for(model)["input_ids"].clamp(min=3)
    right, holes = torch.ones_like(ids), torch.ones_like(ids)
    right[1, -4:] = 0
    holes[0, 2:5] = 0
    cases = {"right": right, "holes": holes}
    if family not in ("bloom", "llama4"):
        visible = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()
        visible[6:, 3] = False
        minimum = torch.finfo(torch.float32).min
        cases["4D"] = torch.where(visible, 0.0, minimum).expand(len(PADS), 1, -1, -1)

    def logits(mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, use_cache=True).logits
        return out[mask.bool()] if mask.dim() == 2 else out

    expected = {name: logits(mask) for name, mask in cases.items()}
    pykvcache.patch(model, block_size=4, backend=backend)
    for name, mask in cases.items():
        torch.testing.assert_close(logits(mask), expected[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention_weights_of_eager_models(family: str) -> None:
    model = copy.deepcopy(make_model(family))
    options = {"output_attentions": True, "return_dict_in_generate": True}
    expected = generate(model, **options)
    pykvcache.patch(model, block_size=4)
    got = generate(model, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions[1]) == model.config.num_hidden_layers
    for step, wanted in zip(got.attentions[1:], expected.attentions[1:], strict=True):
        for layer, weights in zip(step, wanted, strict=True):
            torch.testing.assert_close(layer, weights, rtol=0, atol=1e-5)


def test_inference_mode(llama: PreTrainedModel) -> None:
    expected = WAYS["beam_search"](llama)
    pykvcache.patch(llama, block_size=4)
    with torch.inference_mode():
        result = WAYS["beam_search"](llama)
    assert_same(result, expected)


def test_threads(llama: PreTrainedModel) -> None:
    expected = generate(llama)
    pykvcache.patch(llama, block_size=4)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(generate(llama))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_other_dtypes(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    full = generate(llama, return_dict_in_generate=True).past_key_values.stats()["block_bytes"]
    llama.to(torch.bfloat16)
    half = generate(llama, return_dict_in_generate=True).past_key_values
    assert half.stats()["block_bytes"] == full // 2
    pykvcache.unpatch(llama)
    pykvcache.patch(llama.float(), block_size=4, kv_dtype="bfloat16")
    out = generate(llama, return_dict_in_generate=True)
    assert out.past_key_values.stats()["block_bytes"] == full // 2


def test_deterministic_reaches_the_kernel(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    table = ops.table(backend, "cpu")
    attend, seen = table.paged_attention, set()

    def spy(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.add(args[-1])
        return attend(*args)

    monkeypatch.setattr(table, "paged_attention", spy)
    for deterministic in (True, False):
        with pykvcache.patched(llama, deterministic=deterministic, backend=backend):
            generate(llama)
        assert seen == {deterministic}
        seen.clear()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w0 to w96."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", padding_side="left"
    )


def test_pipeline(llama: PreTrainedModel) -> None:
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer())
    prompts = ["w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15", "w20"]

    def texts() -> list[Any]:
        out: list[Any] = pipe(prompts, max_new_tokens=12, do_sample=False, batch_size=3)
        return out

    expected = texts()
    pykvcache.patch(llama, block_size=4)
    counters.reset()
    assert texts() == expected
    assert counters.paged > 0


def test_copies_of_an_empty_cache_are_apart(llama: PreTrainedModel) -> None:
    first, inputs = PagedCache(llama.config, block_size=4), inputs_for(llama)
    second = copy.deepcopy(first)
    with torch.no_grad():
        expected = llama(**inputs).logits
        for cache, ids in ((first, inputs["input_ids"]), (second, inputs["input_ids"].flip(1))):
            llama(ids[:, :-1], past_key_values=cache)
        last = inputs["input_ids"][:, -1:]
        alone = llama(inputs["input_ids"]).logits[:, -1:]
        torch.testing.assert_close(llama(last, past_key_values=first).logits, alone)
    assert expected.shape[0] == len(last)


def test_pickled_model_generates_the_same(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = llama.generate(**inputs_for(llama), **options)
    again = pickle.loads(pickle.dumps(llama))
    assert torch.equal(again.generate(**inputs_for(llama), **options), expected)


def test_autocast(llama: PreTrainedModel) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama.generate(**inputs_for(llama), **options)
        pykvcache.patch(llama)
        assert torch.equal(llama.generate(**inputs_for(llama), **options), expected)


def test_a_full_pool_leaves_an_empty_cache_empty(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama)
    cache, ids = PagedCache(llama.config, num_blocks=1), inputs_for(llama)["input_ids"]
    with pytest.raises(RuntimeError, match="blocks"):
        llama.generate(ids.repeat(3, 4), past_key_values=cache, max_new_tokens=2)
    assert llama.generate(ids[:1, :4], past_key_values=cache, max_new_tokens=2).shape == (1, 6)


def test_generate_batch(llama: PreTrainedModel) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    options = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=96)
    # by default transformers takes 60 % of the machine's memory for its own pool
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)

    def tokens() -> list[list[int]]:
        outputs = llama.generate_batch(
            prompts, generation_config=options, continuous_batching_config=small
        )
        return sorted(output.generated_tokens for output in outputs.values())

    expected = tokens()
    pykvcache.patch(llama)
    assert tokens() == expected
    assert llama.config._attn_implementation == "pykvcache"


def test_plot(llama: PreTrainedModel, tmp_path: Path) -> None:
    pykvcache.patch(llama, block_size=4)
    with torch.no_grad():
        cache = llama(**inputs_for(llama)).past_key_values
    cache.plot(tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        PagedCache(llama.config).plot(tmp_path / "none.png")


def test_decode_steps_go_past_the_dispatcher(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"write": 0, "attend": 0}
    for name in calls:
        original = getattr(LayerStep, name)

        def counted(self: LayerStep, *args: Any, name: str = name, call: Any = original) -> Any:
            done = call(self, *args)
            calls[name] += done is not None and done is not False
            return done

        monkeypatch.setattr(LayerStep, name, counted)
    pykvcache.patch(llama)
    generate(llama, min_new_tokens=NEW_TOKENS)
    steps = (NEW_TOKENS - 1) * llama.config.num_hidden_layers
    assert calls == {"write": steps, "attend": steps}


@pytest.mark.parametrize("prompt", [1, 5])
def test_heads_that_are_too_wide_are_refused_before_anything_runs(prompt: int) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=640, vocab_size=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 60, (1, prompt))
    before = model.generate(ids, max_new_tokens=3, do_sample=False)
    with pykvcache.patched(model), pytest.raises(ValueError, match="D must be 1 to 576, got 640"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), before)


@pytest.mark.slow
def test_copies_of_a_cache_grow_their_pool_from_several_threads(llama: PreTrainedModel) -> None:
    prompt = torch.randint(3, 60, (1, 40))
    tails = [torch.cat([prompt, torch.randint(3, 60, (1, 4))], 1) for _ in range(4)]

    def run(cache: Any, ids: torch.Tensor) -> torch.Tensor:
        return llama.generate(
            ids, past_key_values=cache, max_new_tokens=150, min_new_tokens=150, do_sample=False
        )

    expected = [run(DynamicCache(config=llama.config), ids) for ids in tails]
    pykvcache.patch(llama)
    for _ in range(3):
        first = PagedCache(llama.config)
        with torch.no_grad():
            llama(prompt, past_key_values=first)
        caches = [copy.deepcopy(first) for _ in tails]
        with ThreadPoolExecutor(len(tails)) as pool:
            got = list(pool.map(run, caches, tails))
        for tokens, wanted in zip(got, expected, strict=True):
            assert torch.equal(tokens, wanted)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_backward_through_blocks_is_an_error_whatever_is_trained(
    llama: PreTrainedModel, trained: str
) -> None:
    for name, parameter in llama.named_parameters():
        parameter.requires_grad = f"layers.0.self_attn.{trained}" in name
    pykvcache.patch(llama)
    cache = PagedCache(llama.config)
    logits = llama(torch.randint(3, 60, (1, 5)), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="no gradient"):
        logits.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_gpu_backends_generate_the_same_tokens(family: str, backend: str) -> None:
    if ops.backends()[backend] != "ready":
        pytest.skip(ops.backends()[backend])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(make_model(family)).to(device)
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    inputs = {name: x.to(device) for name, x in inputs_for(model).items()}
    before = model.generate(**inputs, **options)
    with pykvcache.patched(model, backend=backend):
        assert torch.equal(model.generate(**inputs, **options), before)
