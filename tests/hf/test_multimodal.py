"""Models with images: only the text part is patched; vision keys stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from families import ALTERNATING, DECODER, DEVICE, WINDOW, randomize
from torch import Tensor
from transformers import PreTrainedModel

import pykvcache
from pykvcache.hf import counters

IMAGE = 90
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 16}


def prompts() -> Tensor:
    """Token ids [2, 12] without image tokens."""
    return torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(7)).to(DEVICE)


def noise(*shape: int) -> Tensor:
    """What stands for images."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(DEVICE)


def gemma3() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Tokens of one image attend to each other in both directions."""
    attention = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    config = transformers.Gemma3Config(
        text_config=DECODER | attention | {"layer_types": ALTERNATING},
        vision_config=VISION | {"num_attention_heads": 2, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=91,
        eoi_token_index=92,
    )
    ids = prompts()
    ids[:, 4:8] = IMAGE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": noise(2, 3, 16, 16),
    }
    return transformers.Gemma3ForConditionalGeneration(config), inputs


def mllama() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """One layer caches the keys of the image, of another length than the text's."""
    config = transformers.MllamaConfig(
        text_config=DECODER | {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config=VISION
        | {
            "num_global_layers": 1,
            "attention_heads": 2,
            "patch_size": 8,
            "max_num_tiles": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        image_token_index=IMAGE,
    )
    ids = prompts()
    ids[:, 2] = IMAGE
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long).to(DEVICE),
        "aspect_ratio_mask": torch.ones(2, 1, 2, dtype=torch.long).to(DEVICE),
        "cross_attention_mask": torch.ones(2, 12, 1, 2, dtype=torch.long).to(DEVICE),
    }
    return transformers.MllamaForConditionalGeneration(config), inputs


@pytest.mark.parametrize("make", [gemma3, mllama])
@pytest.mark.parametrize("beams", [1, 3])
def test_images(
    make: Callable[[], tuple[PreTrainedModel, dict[str, Tensor]]], beams: int, backend: str
) -> None:
    model, inputs = make()
    randomize(model)

    def tokens() -> Tensor:
        out: Tensor = model.generate(**inputs, max_new_tokens=14, do_sample=False, num_beams=beams)
        return out

    expected = tokens()
    pykvcache.patch(model, block_size=4, backend=backend)
    assert model.config.text_config._attn_implementation == "pykvcache"
    assert model.config.vision_config._attn_implementation == "sdpa"
    counters.reset()
    assert torch.equal(tokens(), expected)
    assert counters.paged > 0
    assert counters.gathered == 0
    pykvcache.unpatch(model)
    assert model.config.text_config._attn_implementation == "sdpa"
