"""Callers of a patched model get what they got: other masks, dtypes, modes, threads, pipelines."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from families import DEVICE, make_model
from test_identity import TOLERANCE, assert_same
from torch import Tensor
from transformers import PreTrainedModel
from ways import NEW_TOKENS, PADS, PROMPT, WAYS, greedy_tokens, inputs_for

import pykvcache
from pykvcache import operators, ops
from pykvcache.hf import counters
from pykvcache.layer_step import LayerStep


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
        visible = torch.ones(PROMPT, PROMPT, dtype=torch.bool).to(DEVICE).tril()
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
    expected = greedy_tokens(model, **options)
    pykvcache.patch(model, block_size=4)
    got = greedy_tokens(model, **options)
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


def test_autocast(llama: PreTrainedModel) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama.generate(**inputs_for(llama), **options)
        pykvcache.patch(llama)
        assert torch.equal(llama.generate(**inputs_for(llama), **options), expected)


def test_other_dtypes(llama: PreTrainedModel) -> None:
    pykvcache.patch(llama, block_size=4)
    full = greedy_tokens(llama, return_dict_in_generate=True).past_key_values.stats()["block_bytes"]
    llama.to(torch.bfloat16)
    half = greedy_tokens(llama, return_dict_in_generate=True).past_key_values
    assert half.stats()["block_bytes"] == full // 2
    pykvcache.unpatch(llama)
    pykvcache.patch(llama.float(), block_size=4, kv_dtype="bfloat16")
    out = greedy_tokens(llama, return_dict_in_generate=True)
    assert out.past_key_values.stats()["block_bytes"] == full // 2


def test_threads(llama: PreTrainedModel) -> None:
    expected = greedy_tokens(llama)
    pykvcache.patch(llama, block_size=4)
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(greedy_tokens(llama))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


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
            greedy_tokens(llama)
        assert seen == {deterministic}
        seen.clear()


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
    greedy_tokens(llama, min_new_tokens=NEW_TOKENS)
    steps = (NEW_TOKENS - 1) * llama.config.num_hidden_layers
    assert calls == {"write": steps, "attend": steps}


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


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("family", "reaches"), [("llama", 1), ("gemma3", 2)])
def test_layers_share_the_plan_of_a_step(
    family: str, reaches: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ops.backends()[backend] != "ready":
        pytest.skip(ops.backends()[backend])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(make_model(family)).to(device)
    table = operators.table(backend, device)
    make_plan, attend = table.plan, table.paged_attention
    made: list[Tensor] = []
    used: list[Tensor] = []

    def noted_plan(*args: Any) -> Tensor:
        made.append(make_plan(*args))
        return made[-1]

    def noted_attention(*args: Any) -> Any:
        if args[6] == 1:  # max_seqlen_q
            used.append(args[18])
        return attend(*args)

    monkeypatch.setattr(table, "plan", noted_plan)
    monkeypatch.setattr(table, "paged_attention", noted_attention)
    inputs = {name: x.to(device) for name, x in inputs_for(model).items()}
    with pykvcache.patched(model, backend=backend):
        model.generate(**inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    layers = model.config.get_text_config().num_hidden_layers
    assert len(used) == 3 * layers
    assert all(any(plan is one for one in made) for plan in used)
    assert len(made) <= 4 * reaches
