"""Encoders over transformers and timm: their tokens, layers and processors, and who they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn

from zinit.adapter import encoding
from zinit.adapter.encoding import Encoder, EncoderLibrary, encode, load_feature_encoder, same_encoder
from zinit.adapter.registries import ENCODERS
from zinit.errors import BackboneError, CheckpointError, ConfigError
from zinit.registry import Registry

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
         "image_size": 8, "patch_size": 4}  # fmt: skip


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def tower(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "timm":
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=0
        ).eval()
    config: Any = {
        "clip": lambda: transformers.CLIPVisionConfig(**SIZES, projection_dim=12),
        "siglip": lambda: transformers.SiglipVisionConfig(**SIZES),
        "dinov2": lambda: transformers.Dinov2Config(**SIZES),
        "vit": lambda: transformers.ViTConfig(**SIZES),
    }[kind]()
    name = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}.get(kind)
    made = getattr(transformers, name)(config) if name else transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # norms and biases too
    return made.eval()


def tokens_by_hand(model: Any, pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """After the last norm, and CLIP's projection, of every token."""
    if kind == "timm":
        return model.forward_features(pixels)
    out = model(pixel_values=pixels, output_hidden_states=True)
    if kind == "clip":
        inner = getattr(model, "vision_model", model)
        return model.visual_projection(inner.post_layernorm(out.hidden_states[-1]))
    return out.last_hidden_state


KINDS = ("clip", "siglip", "dinov2", "vit", "timm")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_pass_the_last_norm(kind: str) -> None:
    model, pixels = tower(kind), torch.randn(2, 3, 8, 8)
    encoder = load_feature_encoder(model)
    features = encoder(pixels, 3)
    torch.testing.assert_close(features.tokens, tokens_by_hand(model, pixels, kind))
    assert features.tokens.shape == (2, 4 if kind == "siglip" else 5, encoder.width)
    assert features.pooled.shape[0] == 2
    assert [vector.shape for vector in features.layers] == [(2, encoder.layer_width)] * 3
    assert not any(torch.equal(one, two) for one, two in zip(features.layers, features.layers[1:], strict=False))


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_layers_are_class_tokens_of_equally_spaced_layers_the_last_included(kind: str) -> None:
    model, pixels = tower(kind), torch.randn(2, 3, 8, 8)
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    features = load_feature_encoder(model)(pixels, 2)
    for vector, number in zip(features.layers, (2, 4), strict=True):
        torch.testing.assert_close(vector, states[number][:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_frozen_and_stays_in_evaluation_mode(kind: str) -> None:
    encoder = load_feature_encoder(tower(kind)).train()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert not encoder(torch.randn(1, 3, 8, 8)).tokens.requires_grad


def saved(folder: Path, seed: int = 0) -> Path:
    tower("clip", seed).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    return folder


def test_images_pass_the_models_own_processor(tmp_path: Path) -> None:
    encoder = load_feature_encoder(saved(tmp_path))
    expected = transformers.AutoImageProcessor.from_pretrained(tmp_path)(images=[image(1)], return_tensors="pt")
    torch.testing.assert_close(encoder.prepare([image(1)]), expected["pixel_values"])
    path = tmp_path / "one.png"
    image(1).save(path)
    torch.testing.assert_close(encoder.prepare([path]), expected["pixel_values"])


def test_bgr_reverses_the_channels_before_they_are_normalised(tmp_path: Path) -> None:
    plain, reverse = load_feature_encoder(saved(tmp_path)), load_feature_encoder(tmp_path, bgr=True)
    turned = Image.fromarray(np.asarray(image(1))[:, :, ::-1])
    torch.testing.assert_close(reverse.prepare([image(1)]), plain.prepare([turned]))
    assert not torch.allclose(reverse.prepare([image(1)]), plain.prepare([image(1)]))


def test_without_a_processor_pixels_are_asked_for(tmp_path: Path) -> None:
    tower("clip").save_pretrained(tmp_path)
    encoder = load_feature_encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"no preprocessor_config.json.*give pixels \(batch, 3, height, width\)"):
        encoder.prepare([image(1)])
    assert encode(encoder, torch.randn(2, 3, 8, 8)).present is None


def test_each_samples_images(tmp_path: Path) -> None:
    """One image, none, two: tokens one after the other, vectors as means, and the encoder runs once."""
    encoder = load_feature_encoder(saved(tmp_path))
    calls: list[int] = []
    encoder.tower.register_forward_hook(lambda module, args, output: calls.append(1))  # pyright: ignore
    features = encode(encoder, [image(1), None, [image(2), image(3)]], layers=1)
    assert calls == [1]
    single = [encode(encoder, [image(seed)], layers=1) for seed in (1, 2, 3)]
    assert features.present is not None
    assert features.mask is not None
    assert features.present.tolist() == [True, False, True]
    assert features.mask.sum(1).tolist() == [5, 0, 10]
    torch.testing.assert_close(features.tokens[0, :5], single[0].tokens[0])
    torch.testing.assert_close(features.tokens[2], torch.cat([single[1].tokens[0], single[2].tokens[0]]))
    torch.testing.assert_close(features.layers[0][2], (single[1].layers[0][0] + single[2].layers[0][0]) / 2)
    assert not features.layers[0][1].any()
    with pytest.raises(ConfigError, match="none of the 2 samples has an image"):
        encode(encoder, [None, []])


def test_another_encoder_is_told_apart(tmp_path: Path) -> None:
    first, second = load_feature_encoder(saved(tmp_path / "one")), load_feature_encoder(saved(tmp_path / "two", seed=1))
    assert same_encoder(tmp_path / "one", first.identity, beside=nn.Linear(1, 1)).identity == first.identity
    with pytest.raises(CheckpointError, match=r"trained with another encoder than .*two: weights: .* begins"):
        same_encoder(second, first.identity, beside=nn.Linear(1, 1))
    assert (text := load_feature_encoder(tmp_path / "one", bgr=True).difference(first.identity)) is not None
    assert text == "bgr is True, expected False"


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="there is no model folder"):
        load_feature_encoder(tmp_path / "none")
    with pytest.raises(ConfigError, match="no image model of transformers or timm"):
        load_feature_encoder(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no sequence of image tokens"):
        load_feature_encoder(timm.create_model("resnet10t", num_classes=0))
    text = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    for config in (text, transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])):
        with pytest.raises(ConfigError, match="does not turn images into a sequence"):
            load_feature_encoder(transformers.AutoModel.from_config(config))
    with pytest.raises(ConfigError, match="has 4 layers, and 5 are asked for"):
        load_feature_encoder(tower("vit"))(torch.randn(1, 3, 8, 8), 5)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"7", b"[" * 10**5], ids=["torn", "no text", "a number", "deep"])
def test_an_encoder_whose_settings_are_damaged_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BackboneError, match=r"cannot be loaded|config\.json"):
        load_feature_encoder(folder)


class Mine(EncoderLibrary):
    """Somebody's own library, which claims names that begin with "mine-"."""

    def knows(self, source: str) -> bool:
        return source.startswith("mine-")

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        return None

    def load(self, source: str | Path, **options: Any) -> Encoder:
        return load_feature_encoder(tower("vit"))


MINE = Mine()


def test_a_library_that_is_registered_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("encoder library", {name: ENCODERS.where(name) for name in ENCODERS})
    registry.register("zz", "tests.encoders.test_encoders:MINE")
    monkeypatch.setattr(encoding, "ENCODERS", registry)
    assert load_feature_encoder("mine-small").depth == 4


def test_every_library_of_the_registry_wraps_and_loads() -> None:
    assert {"timm", "transformers"} <= set(ENCODERS)
    assert all(hasattr(ENCODERS.get(name), method) for name in ENCODERS for method in ("knows", "load"))
    assert isinstance(load_feature_encoder(load_feature_encoder(tower("vit"))), Encoder)
