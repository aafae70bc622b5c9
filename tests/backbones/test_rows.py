"""Rows of a tower are not always the samples of the batch: what is given for each sample is never spread on a guess."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import zinit
from tests.contract.cases import SMALL_TEXT, SMALL_VISION, causal_lm, clip, encoder, randomized, text_batch
from zinit.backbones import find_backbone
from zinit.errors import ConfigError

IMAGE = 5  # the token that stands for a patch of an image
Open = Callable[[Any, int], AbstractContextManager[None]]


def llava() -> Any:
    """A vision tower in front of a LLaMA; each image is 16 tokens of the text."""
    sizes: dict[str, Any] = SMALL_TEXT | {"max_position_embeddings": 128, "bos_token_id": 1}
    shape: dict[str, Any] = SMALL_VISION
    vision, text = transformers.CLIPVisionConfig(**shape), transformers.LlamaConfig(**sizes)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return randomized(transformers.LlavaForConditionalGeneration(config))


def texts_with(*images: int) -> dict[str, Tensor]:
    """Texts with so many images, padded on the left."""
    generator = torch.Generator().manual_seed(6)
    longest = 16 * max(images) + 4
    ids, mask = torch.zeros(len(images), longest, dtype=torch.long), torch.zeros(len(images), longest, dtype=torch.long)
    for row, count in enumerate(images):
        words = torch.randint(6, 61, (4,), generator=generator)
        ids[row, longest - 16 * count - 4 :] = torch.cat([torch.full((16 * count,), IMAGE), words])
        mask[row, longest - 16 * count - 4 :] = 1
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
def last(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits[:, -1]


def route(handle: zinit.Handle, samples: int) -> AbstractContextManager[None]:
    return handle.route(["default", None, "default"][:samples])


def context(handle: zinit.Handle, samples: int) -> AbstractContextManager[None]:
    return handle.context(torch.randn(samples, 1, 32, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("scope", [route, context])
@pytest.mark.parametrize("images", [(1, 3), (2, 2), (2, 0), (1, 1)], ids=str)
def test_images_are_no_samples(images: tuple[int, int], scope: Open) -> None:
    """Four images of two texts could be two each, and two of two texts could be both of the first."""
    model = llava()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7))
    with scope(handle, 2), pytest.raises(ConfigError, match=r"vision_tower.*such as images.*towers="):
        last(model, texts_with(*images))
    with scope(handle, 1):  # what is for one sample is for all its images
        assert torch.isfinite(last(model, texts_with(3))).all()


@pytest.mark.parametrize("scope", [route, context])
def test_the_language_tower_s_rows_are_samples(scope: Open) -> None:
    model, batch = llava(), texts_with(1, 3)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7, towers=("language_model",)))
    with handle.disabled():
        base = last(model, batch)
    whole = last(model, batch)
    with scope(handle, 2):
        got = last(model, batch)
    assert not torch.allclose(got[0], base[0])
    if scope is route:
        torch.testing.assert_close(got, torch.stack([whole[0], base[1]]))


@pytest.mark.parametrize("scope", [route, context])
@torch.no_grad()
def test_texts_of_another_number_than_the_images(scope: Open) -> None:
    model: Any = clip()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7))
    texts, pixels = text_batch("right"), torch.randn(2, 3, 16, 16)
    six = {name: torch.cat([x, x]) for name, x in texts.items()}
    with scope(handle, 2), pytest.raises(ConfigError, match=r"2 samples does not fit a batch of 6 at text_model"):
        model(**six, pixel_values=pixels)
    with scope(handle, 2):
        model(**{name: x[:2] for name, x in texts.items()}, pixel_values=pixels)
    handle.detach()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7, towers=("vision_model",)))
    with scope(handle, 2):
        model(**six, pixel_values=pixels)


def test_beams_are_where_text_is_generated() -> None:
    kinds: dict[str, nn.Module] = {"beams": causal_lm("Llama"), "samples": encoder("Roberta")}
    for rows, model in kinds.items():
        assert {site.rows for site in find_backbone(model).sites(model)} == {rows}
    with_discovery = {causal_lm("GPT2"): {"beams"}, encoder("Esm"): {"samples"}}
    for model, rows in with_discovery.items():
        assert {site.rows for site in find_backbone(model).sites(model)} == rows
    sizes: dict[str, Any] = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_model": 32, "vocab_size": 61}
    both = transformers.T5Model(transformers.T5Config(**sizes))
    rows = {site.name.partition(".")[0]: site.rows for site in find_backbone(both).sites(both)}
    assert rows == {"encoder": "samples", "decoder": "beams"}


def test_rows_that_are_no_beams_must_be_as_many_as_the_samples() -> None:
    model: Any = encoder("Roberta")
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7))
    batch = {name: torch.cat([x, x]) for name, x in text_batch("right").items()}
    with handle.route(["default", None, None]), pytest.raises(ConfigError, match="give one for each"), torch.no_grad():
        model(**batch)


def test_plain_prefix_tuning_with_a_context_for_each_sample() -> None:
    model: Any = llava()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gating=False, separate_softmax=False))
    with context(handle, 2), pytest.raises(ConfigError, match=r"a context for 2 samples.*vision_tower"):
        last(model, texts_with(1, 3))
