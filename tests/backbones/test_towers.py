"""Models of several towers: which get a prefix, how layers are counted, what a file says about it; cross-attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zinit
from tests.contract.cases import Batch, caption_batch, clip, encoder, randomized, text_batch

OPEN: dict[str, Any] = {"length": 5, "gate_init": 0.7}


def embeddings(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(**batch)
    return output.image_embeds, output.text_embeds


@pytest.mark.parametrize(
    ("towers", "vision", "text"),
    [
        (None, True, True),
        (["vision_model"], True, False),
        (["text_model"], False, True),
        (["text_model.encoder.layers"], False, True),
        (["vision_model", "text_model"], True, True),
    ],
)
def test_towers_are_chosen_by_name(towers: list[str] | None, vision: bool, text: bool) -> None:
    model, batch = clip(), caption_batch("right")
    image, caption = embeddings(model, batch)
    handle = zinit.attach(model, zinit.PrefixConfig.from_dict({"layers": 2, "towers": towers} | OPEN))
    expected = ["text_model.encoder.layers.1", "text_model.encoder.layers.2"] * text
    expected += ["vision_model.encoder.layers.1", "vision_model.encoder.layers.2"] * vision
    assert list(handle.prefixes) == [f"{layer}.self_attn" for layer in expected]
    now_image, now_caption = embeddings(model, batch)
    assert torch.equal(now_image, image) != vision
    assert torch.equal(now_caption, caption) != text


def test_an_unknown_tower_is_refused() -> None:
    for wrong in ("txt", "model", "text_mod"):
        with pytest.raises(zinit.BackboneError, match=f"no tower '{wrong}'") as error:
            zinit.attach(clip(), zinit.PrefixConfig(towers=(wrong,)))
        assert "text_model.encoder.layers (3 layers)" in str(error.value)


def test_too_many_layers_name_the_tower() -> None:
    with pytest.raises(zinit.BackboneError, match=r"tower text_model.*of CLIPModel has 3 .*vision_model"):
        zinit.attach(clip(), zinit.PrefixConfig(layers=4))


@pytest.mark.parametrize("wrong", [[], ["a", 3], 3, "", [""]])
def test_towers_are_a_list_of_names(wrong: Any) -> None:
    with pytest.raises(zinit.ConfigError, match="towers must be a list of names"):
        zinit.PrefixConfig.from_dict({"towers": wrong})


def test_a_file_remembers_its_towers(tmp_path: Path) -> None:
    model, batch = clip(), caption_batch("right")
    handle = zinit.attach(model, zinit.PrefixConfig(layers=2, towers=("vision_model",), **OPEN))
    handle.save(tmp_path)
    fresh = clip()
    loaded = zinit.load(fresh, tmp_path)
    assert loaded.config.towers == ("vision_model",)
    for now, before in zip(embeddings(fresh, batch), embeddings(model, batch), strict=True):
        assert torch.equal(now, before)
    with pytest.raises(zinit.CheckpointError, match="type is 'clip_vision_model' here, but 'clip'"):
        zinit.load(fresh.vision_model, tmp_path, name="other")  # pyright: ignore


def test_towers_of_other_widths_are_told_apart(tmp_path: Path) -> None:
    zinit.attach(clip(), zinit.PrefixConfig(**OPEN)).save(tmp_path)
    config = clip().config  # pyright: ignore
    config.vision_config.hidden_size = 48  # pyright: ignore
    with pytest.raises(zinit.CheckpointError, match="towers is"):
        zinit.load(transformers.CLIPModel(config), tmp_path)  # pyright: ignore


def test_a_tower_alone_is_a_model() -> None:
    model, batch = clip(), caption_batch("right")
    image, caption = embeddings(model, batch)
    handle = zinit.attach(model.vision_model, zinit.PrefixConfig(layers=2, **OPEN))  # pyright: ignore
    assert handle.backbone == "clip"
    assert not torch.equal(embeddings(model, batch)[0], image)
    assert torch.equal(embeddings(model, batch)[1], caption)
    handle.detach()
    assert torch.equal(embeddings(model, batch)[0], image)


# --- cross-attention ----------------------------------------------------------------------------------------------


def test_cross_attention_of_a_decoding_encoder_is_left_alone() -> None:
    model = encoder("Bert")
    config = model.config  # pyright: ignore
    config.is_decoder = config.add_cross_attention = True  # pyright: ignore
    decoder = randomized(transformers.BertLMHeadModel(config))  # pyright: ignore
    handle = zinit.attach(decoder)
    assert [name.rpartition(".layer.")[2] for name in handle.prefixes] == [f"{i}.attention.self" for i in range(3)]
    assert not any(hasattr(module, "zinit") for name, module in decoder.named_modules() if "crossattention" in name)


SMALL = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 61, "max_position_embeddings": 64}
COUNTS = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | dict.fromkeys(
    ("encoder_attention_heads", "decoder_attention_heads"), 4
)


@pytest.mark.parametrize("kind", ["Bart", "Marian", "T5", "GPT2"])
def test_only_self_attention_is_adapted(kind: str) -> None:
    """Watched while it runs: no adapted module is ever given another sequence's states."""
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            n_embd=32, n_head=4, n_layer=2, vocab_size=61, add_cross_attention=True, bos_token_id=1, eos_token_id=2
        )
        model: Any = transformers.GPT2LMHeadModel(config)
        batch: dict[str, Any] = text_batch("none") | {"encoder_hidden_states": torch.randn(3, 4, 32)}
    else:
        sizes = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_model": 32, "vocab_size": 61}
        sizes = sizes if kind == "T5" else SMALL | COUNTS
        config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, decoder_start_token_id=0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        batch = text_batch("right") | {"decoder_input_ids": text_batch("none")["input_ids"][:, :4]}
    model = randomized(model)
    with torch.no_grad():  # with gradients for a position bias torch attends with another kernel
        frozen = model(**batch).logits
    handle = zinit.attach(model, zinit.PrefixConfig(length=5))
    assert handle.backbone == "transformers"
    expected = 2 if kind == "GPT2" else 4
    assert len(handle.prefixes) == expected
    given: list[str] = []
    for site in handle.sites:
        site.module.register_forward_pre_hook(
            lambda module, args, kwargs: given.extend(
                k for k, v in kwargs.items() if k in ("key_value_states", "encoder_hidden_states") and v is not None
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, frozen)
    assert not given
    for prefix in handle.prefixes.values():
        nn.init.constant_(prefix.gate, 0.7)
    model(**batch).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in handle.parameters())
