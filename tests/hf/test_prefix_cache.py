"""`patch(model, prefix_cache=True)`: later calls begin with blocks of earlier ones, same tokens."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import DEVICE, FAMILIES, make_model
from test_identity import assert_same, can, unpatched
from torch import Tensor
from transformers import PreTrainedModel
from ways import WAYS

import pykvcache
from pykvcache.allocator import BlockAllocator, OutOfBlocks
from pykvcache.hf.patching import STATE

STATEFUL = ("qwen3_next", "bamba")
ENCODERS = ("t5", "bart", "whisper")
DECODERS = [family for family in FAMILIES if family not in STATEFUL + ENCODERS]


class Twins:
    """A patched model, and the same one unpatched."""

    def __init__(self, family: str = "llama", **settings: Any) -> None:
        self.plain = copy.deepcopy(make_model(family))
        self.patched = copy.deepcopy(self.plain)
        pykvcache.patch(self.patched, prefix_cache=True, **{"block_size": 4} | settings)
        self.computed: list[int] = []  # tokens a row of each forward
        self.patched.get_input_embeddings().register_forward_hook(
            lambda module, args, output: self.computed.append(args[0].shape[1])
        )

    @property
    def allocator(self) -> BlockAllocator:
        pool = self.patched.__dict__[STATE].prefixes.pool
        assert pool.allocator is not None
        return pool.allocator

    def generate(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Tokens of both, which must be equal; `computed` is set."""
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask} | options
        torch.manual_seed(0)
        expected = self.plain.generate(ids, **options)
        self.computed.clear()
        torch.manual_seed(0)
        tokens: Tensor = self.patched.generate(ids, **options)
        assert tokens.tolist() == expected.tolist()
        self.allocator.check_integrity()
        return tokens


def prompt(seed: int, tokens: int, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, tokens), generator=generator).to(DEVICE)


@pytest.mark.parametrize("family", DECODERS)
def test_every_way_of_generating_stays_the_same(family: str) -> None:
    """Twice over one pool, so that everything begins with what another way has left."""
    plain = make_model(family)
    ways = [way for way in WAYS if can(family, way)]
    expected = {way: unpatched(copy.deepcopy(plain), way) for way in ways}
    model = pykvcache.patch(copy.deepcopy(plain), block_size=4, prefix_cache=True)
    for way in ways * 2:
        assert_same(WAYS[way](model), expected[way])
    allocator = model.__dict__[STATE].prefixes.pool.allocator
    allocator.check_integrity()
    assert allocator.stats().hit_tokens > 0
    gc.collect()
    assert allocator.num_sequences == 0 and allocator.num_free == allocator.num_blocks


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_only_what_is_new_is_computed(family: str) -> None:
    twins = Twins(family)
    begin = prompt(0, 21)
    first = twins.generate(torch.cat([begin, prompt(1, 5)], 1))
    assert twins.computed == [26, 1, 1, 1, 1, 1]
    twins.generate(torch.cat([begin, prompt(2, 9)], 1))
    assert twins.computed[0] == 9
    twins.generate(torch.cat([first, prompt(3, 2)], 1))
    assert twins.computed[0] == 3, "all of the first call but its last token, and the new ones"
    twins.generate(first[:, :15])
    assert twins.computed[0] == 1, "also blocks that had left the window"
    twins.generate(prompt(4, 12))
    assert twins.computed[0] == 12


def test_rows_of_a_batch_begin_with_what_all_of_them_have() -> None:
    twins = Twins()
    ids = prompt(0, 16, rows=3)
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :9] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    twins.generate(ids, mask)
    twins.generate(ids, mask)
    assert twins.computed[0] == 1
    ids[0, 14] = 96 - ids[0, 14]
    twins.generate(ids, mask)
    assert twins.computed[0] == 2
    ids[2, 12] = 96 - ids[2, 12]
    twins.generate(ids, mask)
    assert twins.computed[0] == 4
    twins.generate(ids[1:2, 3:])
    assert twins.computed[0] == 1
    twins.generate(torch.cat([ids[:1], prompt(5, 16)]))
    assert twins.computed[0] == 16


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sampling_and_beams(family: str, options: dict[str, Any]) -> None:
    twins = Twins(family)
    for _ in range(3):
        tokens = twins.generate(prompt(0, 14), **options)
        twins.generate(torch.cat([tokens[:1], prompt(1, 3)], 1), **options)


Change = Callable[[PreTrainedModel], object]


def add_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(0.5)


def replace_parameter(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = torch.nn.Parameter(attention.v_proj.weight * 2)


def write_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def load(model: PreTrainedModel) -> None:
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def train_a_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model(prompt(9, 8), labels=prompt(9, 8)).loss.backward()
    optimizer.step()


def change_dtype(model: PreTrainedModel) -> None:
    model.to(torch.float64)


CHANGES: list[Change] = [
    add_in_place,
    replace_parameter,
    write_data,
    load,
    train_a_step,
    change_dtype,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_is_reused_after_the_weights_changed(change: Change) -> None:
    twins = Twins()
    ids = prompt(0, 20)
    before = twins.generate(ids)
    twins.generate(ids)
    assert twins.computed[0] == 1
    for model in (twins.plain, twins.patched):
        change(model)
    if change is change_dtype:  # the pool has no such dtype: the error is the usual one
        with pytest.raises(TypeError, match="keys must be one of"):
            twins.patched.generate(ids, max_new_tokens=1)
        for model in (twins.plain, twins.patched):
            model.float()
    after = twins.generate(ids)
    assert twins.computed[0] == 20
    if change is not change_dtype:
        assert after.tolist() != before.tolist()
    twins.generate(ids)
    assert twins.computed[0] == 1


def test_nothing_is_reused_that_a_part_in_training_mode_has_computed() -> None:
    twins = Twins()
    ids = prompt(0, 20)
    twins.patched.model.train()
    twins.generate(ids)
    twins.patched.model.eval()
    twins.generate(ids)
    assert twins.computed[0] == 20


def test_a_cache_that_outlives_a_change_does_not_mix() -> None:
    twins = Twins()
    ids = prompt(0, 9)
    out = twins.patched.generate(
        ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    for model in (twins.plain, twins.patched):
        add_in_place(model)
    more = torch.cat([out.sequences, prompt(1, 8)], 1)
    twins.patched.generate(
        more, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False
    )
    del out
    twins.generate(more)
    assert twins.computed[0] == more.shape[1]


def test_what_depends_on_more_than_tokens_is_not_kept() -> None:
    twins = Twins()
    ids = prompt(0, 12)
    model = twins.patched
    embeds = model.get_input_embeddings()(ids)
    right_padding = torch.ones_like(ids)
    right_padding[0, -2:] = 0
    with torch.no_grad():
        model(inputs_embeds=embeds)
        model(ids, position_ids=torch.arange(12).to(DEVICE)[None] * 2)
        model(ids, attention_mask=right_padding)
        model(ids, attention_mask=torch.zeros(1, 1, 12, 12).to(DEVICE))
        model.train()
        model(ids)
        model.eval()
    twins.generate(ids)
    assert twins.computed[0] == 12
    with torch.no_grad():
        model(prompt(1, 12))
    twins.generate(prompt(1, 12))
    assert twins.computed[0] == 1, "a plain forward is"


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    twins = Twins()
    ids = prompt(0, 12)
    layer = twins.patched.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        twins.patched.generate(ids, max_new_tokens=2)
    hook.remove()
    gc.collect()
    twins.generate(ids)
    assert twins.computed[0] == 12
    gc.collect()
    assert twins.allocator.num_sequences == 0


def test_a_small_pool_evicts_and_stays_right() -> None:
    twins = Twins(num_blocks=12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        begin, rest = torch.randint(0, 4, (2,), generator=generator).tolist()
        ids = torch.cat([prompt(begin, 11), prompt(10 + rest, 7)], 1)
        twins.generate(ids[:, : int(torch.randint(5, 19, (1,), generator=generator))])
    stats = twins.allocator.stats()
    assert stats.evictions > 50 and stats.hit_tokens > 100
    with pytest.raises(OutOfBlocks):
        twins.patched.generate(prompt(99, 50), max_new_tokens=1)
    twins.generate(prompt(0, 11))


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 60}], ids=["growing", "fixed"])
def test_threads_share_prefixes(settings: dict[str, int]) -> None:
    twins = Twins(**settings)
    prompts = [torch.cat([prompt(i % 3, 13), prompt(10 + i % 5, 6)], 1) for i in range(24)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [twins.plain.generate(ids, **options).tolist() for ids in prompts]
    twins.patched.generate(prompts[0], **options)
    with ThreadPoolExecutor(3) as threads:
        tokens = threads.map(lambda ids: twins.patched.generate(ids, **options).tolist(), prompts)
        assert list(tokens) == expected
    gc.collect()
    twins.allocator.check_integrity()
    assert twins.allocator.num_sequences == 0 and twins.allocator.stats().hit_tokens > 100


def test_hidden_states_are_asked_for_all_tokens() -> None:
    twins = Twins()
    ids = prompt(0, 12)
    twins.generate(ids)
    out = twins.patched.generate(
        ids, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True
    )
    assert out.hidden_states[0][0].shape[1] == 12


def test_copies_of_a_model_have_a_pool_of_their_own() -> None:
    twins = Twins()
    ids = prompt(0, 12)
    twins.generate(ids)
    for twin in (copy.deepcopy(twins.patched), pickle.loads(pickle.dumps(unhooked(twins)))):
        state = twin.__dict__[STATE]
        assert state.prefixes.pool is None
        twin.generate(ids, max_new_tokens=2)
        assert state.prefixes.pool is not twins.patched.__dict__[STATE].prefixes.pool


def unhooked(twins: Twins) -> PreTrainedModel:
    twins.patched.get_input_embeddings()._forward_hooks.clear()  # a lambda
    return twins.patched


def test_unpatch_drops_the_pool_and_the_hooks() -> None:
    model = copy.deepcopy(make_model("llama"))
    before = sorted(model.__dict__), len(model._forward_hooks), len(model._forward_pre_hooks)
    pykvcache.patch(model, prefix_cache=True)
    with pytest.raises(ValueError, match="patched with other settings"):
        pykvcache.patch(model)
    pykvcache.unpatch(model)
    assert before == (
        sorted(model.__dict__),
        len(model._forward_hooks),
        len(model._forward_pre_hooks),
    )


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("t5", "prefix_cache needs a decoder, T5ForConditionalGeneration has an encoder too"),
        ("bamba", "prefix_cache needs attention in every layer: BambaConfig has"),
    ],
)
def test_models_that_cannot_are_refused(family: str, text: str) -> None:
    model = copy.deepcopy(make_model(family))
    with pytest.raises(ValueError, match=text):
        pykvcache.patch(model, prefix_cache=True)
    assert STATE not in model.__dict__
