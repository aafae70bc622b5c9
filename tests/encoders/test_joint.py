"""PE-AV: sounds and videos as vectors of one space, by the model's own projection, whatever shares the batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.encoders.test_senses import clip, tone
from zinit.adapter.encoding import encode, load_feature_encoder
from zinit.encoders import cache as cache_module
from zinit.encoders.audio import read_sound
from zinit.encoders.cache import FeatureCache
from zinit.errors import BackboneError, ConfigError

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8
}  # fmt: skip
TEXT = {**{name: size for name, size in SIZES.items() if name != "head_dim"}, "hidden_size": 12, "vocab_size": 40,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
HEARING = {**SIZES, "dac_config": {"encoder_hidden_size": 4, "downsampling_ratios": [2, 4], "codebook_dim": 4,
                                   "hidden_size": 16, "hop_length": 8}}  # fmt: skip
TINY = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
VIT = {"architecture": "vit_tiny_patch16_224", "do_pooling": True, "num_classes": 10, "model_args": TINY}
SEEING = {**SIZES, "vision_config": VIT}
RATE = 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random PE-AV of both senses, with its own extractors."""
    folder = tmp_path_factory.mktemp("pe_av")
    torch.manual_seed(0)
    config = transformers.PeAudioVideoConfig(
        text_config=TEXT, audio_video_config={**SIZES, "audio_config": HEARING, "video_config": SEEING}
    )
    model = transformers.PeAudioVideoModel(config)
    with torch.no_grad():  # a projection whose start is all but zero would hide that it is left out
        for head in (model.audio_model.audio_head, model.video_model.video_head):
            for parameter in head.parameters():
                parameter.normal_()
    model.save_pretrained(folder)
    transformers.PeAudioFeatureExtractor(sampling_rate=RATE, hop_length=8).save_pretrained(folder)
    processor = transformers.PeVideoVideoProcessor(do_resize=True, size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.PeAudioVideoModel.from_pretrained(folder).eval()


def test_a_sound_is_its_vector_in_the_joint_space(folder: Path, model: Any, tmp_path: Path) -> None:
    encoder = load_feature_encoder(f"audio:{folder}")
    assert (encoder.modality, encoder.depth, encoder.pooled_width) == ("audio", 1, 12)
    files = [tone(tmp_path / "long.wav", 90, RATE, seconds=1), tone(tmp_path / "short.wav", 50, RATE, seconds=0.43)]
    together = encode(encoder, files, layers=1)
    for row, file in enumerate(files):  # alone, where nothing is padding
        made = transformers.PeAudioFeatureExtractor.from_pretrained(folder)(
            [read_sound(file, RATE)], sampling_rate=RATE, return_tensors="pt"
        )
        with torch.no_grad():
            expected = model.get_audio_embeds(made["input_values"])[0]
        for found in (together.pooled, together.layers[0], together.tokens[:, 0]):  # type: ignore[index]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_a_video_is_its_vector_in_the_joint_space(
    folder: Path, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    encoder = load_feature_encoder(f"video:{folder}")
    assert capsys.readouterr().out == "", "answers and JSON go there"
    assert (encoder.modality, encoder.depth, encoder.pooled_width) == ("video", 1, 12)
    clips = [clip(tmp_path / "a", 20), clip(tmp_path / "b", 3)]
    pixels = encoder.prepare(clips)
    assert pixels.shape == (2, 16, 3, 32, 32)
    features = encode(encoder, clips, layers=1)
    with torch.no_grad():
        out = model.video_model.video_encoder(pixels)
        expected = model.video_model.video_head(out.pooler_output)
    torch.testing.assert_close(features.pooled, expected)
    torch.testing.assert_close(features.tokens, expected.unsqueeze(1))
    assert not torch.allclose(expected[0], expected[1])


def test_sounds_of_any_length_are_kept_in_one_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "IMAGES_PER_PASS", 2)
    encoder = load_feature_encoder(f"audio:{folder}")
    files = [tone(tmp_path / f"{n}.wav", 60 + n, RATE, seconds=0.3 + 0.2 * n) for n in range(3)]
    source: Any = SimpleNamespace(takes=("tokens", "pooled"), layers=0)
    cache = FeatureCache(encoder, source, root=tmp_path / "cache", limit=1)
    digests = [bytes([number] * 32) for number in range(3)]
    cache.fill(dict(zip(digests, files, strict=True)))
    kept = cache.features([[digest] for digest in digests])
    torch.testing.assert_close(kept.pooled, encode(encoder, files).pooled, rtol=1e-4, atol=1e-5)


def test_ready_sounds_need_their_mask_and_modules_are_known(folder: Path, model: Any) -> None:
    encoder = load_feature_encoder(model)
    assert encoder.modality == "audio"
    assert load_feature_encoder(model.video_model).modality == "video"
    for wrong in (torch.zeros(2, 1, 80), torch.zeros(2, 80)):
        with pytest.raises(ConfigError, match=r"\(batch, 2, samples\)"):
            encode(encoder, wrong)
    assert encode(encoder, torch.ones(2, 2, 80)).pooled is not None


def test_without_its_projection_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(folder / "model.safetensors")
    less = {name: tensor for name, tensor in weights.items() if not name.startswith("audio_model.audio_head")}
    assert len(less) < len(weights)
    save_file(less, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks weights of its audio encoder: audio_model\.audio_head"):
        load_feature_encoder(f"audio:{tmp_path}")
