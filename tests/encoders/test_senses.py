"""Encoders of sound and video: tiny random models, real files, tokens after the last norm, adapters that hear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import zinit
from tests.encoders.senses import made, saved
from tests.shared import SHARED, needs_data
from tests.tiny import save_tiny_llama
from zinit.adapter.encoding import encode, load_feature_encoder
from zinit.demo import vit_path
from zinit.encoders.audio import read_sound
from zinit.encoders.frames import read_frames, spaced
from zinit.errors import BackboneError, ConfigError, DataError

SOUNDS, VIDEOS = ("ast", "whisper", "clap"), ("videomae", "vjepa2")


def tone(path: Path, hertz: float, rate: int = 22_050, channels: int = 2, seconds: float = 1) -> Path:
    soundfile = pytest.importorskip("soundfile")
    wave = np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)
    soundfile.write(path, np.stack([wave] * channels, axis=1) if channels > 1 else wave, rate)
    return path


def clip(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def item(kind: str, folder: Path, seed: int) -> Path:
    return (
        tone(folder / f"{seed}.wav", 300 * (seed + 1), seconds=1.5)
        if kind in SOUNDS
        else clip(folder / f"clip{seed}", 6 + seed)
    )


def extracted(kind: str, model: Path, items: list[Path]) -> torch.Tensor:
    """What the model's own extractor makes of the items, read here."""
    if kind in VIDEOS:
        processor = transformers.AutoVideoProcessor.from_pretrained(model)
        files = [sorted(folder.glob("*.png")) for folder in items]
        chosen = [[Image.open(own[number]) for number in spaced(len(own), 4)] for own in files]
        return processor(chosen, return_tensors="pt")[processor.model_input_names[0]]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(model)
    rate = extractor.sampling_rate
    sounds = [read_sound(file, rate)[: rate if kind == "clap" else None] for file in items]
    return extractor(sounds, sampling_rate=rate, return_tensors="pt")[extractor.model_input_names[0]]


@pytest.mark.parametrize("kind", [*SOUNDS, *VIDEOS])
def test_files_pass_the_models_own_extractor_and_its_last_norm(kind: str, tmp_path: Path) -> None:
    encoder = load_feature_encoder(saved(kind, tmp_path / "model"))
    count = encoder.depth
    assert encoder.modality == ("audio" if kind in SOUNDS else "video")
    items = [item(kind, tmp_path, seed) for seed in (0, 1)]
    ready = encoder.prepare(items)
    features = encode(encoder, items, layers=count)
    torch.testing.assert_close(ready, extracted(kind, tmp_path / "model", items))
    model = made(kind)
    tower = model.encoder if kind == "whisper" else model
    with torch.no_grad():
        out = tower(ready, output_hidden_states=True, **({"skip_predictor": True} if kind == "vjepa2" else {}))
    tokens = out.last_hidden_state.flatten(2).transpose(1, 2) if kind == "clap" else out.last_hidden_state
    torch.testing.assert_close(features.tokens, tokens)
    assert features.tokens is not None
    assert features.pooled is not None
    assert features.tokens.shape[::2] == (2, encoder.width)
    assert features.pooled.shape == (2, encoder.pooled_width)
    layers = [tokens] if kind == "clap" else out.hidden_states[1:]
    assert len(features.layers) == len(layers) == count
    for found, expected in zip(features.layers, layers, strict=True):
        torch.testing.assert_close(found, expected.mean(1))
    pooled = {"clap": "audio_embeds", "ast": "pooler_output"}.get(kind)
    torch.testing.assert_close(features.pooled, getattr(out, pooled) if pooled else tokens.mean(1))
    assert not torch.allclose(features.pooled[0], features.pooled[1])
    assert torch.equal(encoder.prepare(items), ready)  # nothing is cut at random


def test_sounds_are_mixed_down_and_resampled(tmp_path: Path) -> None:
    sound = read_sound(tone(tmp_path / "a.wav", 441.0), 16_000)
    expected = np.sin(2 * np.pi * 441.0 * np.arange(16_000) / 16_000)
    assert sound.shape == (16_000,)
    assert np.abs(sound[800:-800] - expected[800:-800]).max() < 1e-2
    same = read_sound(tone(tmp_path / "b.wav", 441.0, rate=16_000, channels=1), 16_000)
    assert np.abs(same - expected).max() < 1e-4
    (tmp_path / "c.wav").write_bytes(b"RIFFnothing")
    for name, message in (("c.wav", "is no sound that can be read"), ("d.wav", "there is no sound")):
        with pytest.raises(DataError, match=message):
            read_sound(tmp_path / name, 16_000)


def test_frames_are_equally_spaced(tmp_path: Path) -> None:
    assert spaced(7, 4) == [0, 2, 4, 6]
    assert spaced(2, 4) == [0, 0, 1, 1]
    folder = clip(tmp_path / "clip", 7)
    found = read_frames(folder, 4)
    files = sorted(folder.glob("*.png"))
    for frame, number in zip(found, (0, 2, 4, 6), strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(Image.open(files[number])))
    first, *rest = [Image.open(file) for file in files]
    first.save(tmp_path / "moving.webp", save_all=True, append_images=rest, lossless=True)
    moving = read_frames(tmp_path / "moving.webp", 4)
    assert all(np.array_equal(np.asarray(one), np.asarray(two)) for one, two in zip(moving, found, strict=True))
    (tmp_path / "empty").mkdir()
    strip = Image.new("RGB", (2, 200))
    strip.save(tmp_path / "strip.gif", save_all=True, append_images=[strip])
    for bad, message in (
        (tmp_path / "gone", "there is no video"),
        (tmp_path / "empty", "holds no frames"),
        (tmp_path / "strip.gif", "2 x 200 pixels: one side is more than 50 times"),
    ):
        with pytest.raises(DataError, match=message):
            read_frames(bad, 2)


def test_frames_of_a_video_file(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="av is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 4_000_000
        for number in range(9):
            grey = np.full((32, 48, 3), 20 + 25 * number, np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        video.mux(stream.encode())
    frames = read_frames(tmp_path / "a.mp4", 4)
    assert [frame.size for frame in frames] == [(48, 32)] * 4
    for frame, number in zip(frames, spaced(9, 4), strict=True):
        assert abs(np.asarray(frame).mean() - (20 + 25 * number)) < 4
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no video that can be read"):
        read_frames(tmp_path / "b.mp4", 4)


def test_frames_of_an_image_model(tmp_path: Path) -> None:
    encoder, images = load_feature_encoder(f"frames:{vit_path()}"), load_feature_encoder(vit_path())
    folder = clip(tmp_path / "clip", 8)
    video, alone = encode(encoder, [folder], layers=2), encode(images, sorted(folder.glob("*.png")), layers=2)
    assert video.tokens is not None
    assert alone.tokens is not None
    assert alone.pooled is not None
    torch.testing.assert_close(video.tokens[0], alone.tokens.flatten(0, 1))
    torch.testing.assert_close(video.pooled, alone.pooled.mean(0, keepdim=True))
    torch.testing.assert_close(video.layers[1], alone.layers[1].mean(0, keepdim=True))


@needs_data
def test_an_adapter_hears_real_sounds(tmp_path: Path) -> None:
    """Closed gates leave the model as it was; open, one sound is not another, and silence not there is exactly zero."""
    pytest.importorskip("soundfile")
    sounds = [SHARED / "data/examples/imagebind" / f"{name}_audio.wav" for name in ("dog", "car")]
    model = transformers.LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "llama")).eval()
    ids = torch.arange(3, 11)[None].repeat(3, 1)
    with torch.no_grad():
        frozen = model(ids).logits
    config = zinit.AdapterConfig(
        parts={"early": zinit.PrefixConfig(length=3, layers=(0,), prompt="context")}, context="visual-tokens",
        context_options={"hidden": 8, "blocks": 1, "heads": 2},
    )  # fmt: skip
    handle = zinit.attach(model, config, encoder=saved("ast", tmp_path / "ast"))
    with torch.no_grad():
        with handle.given(audio=[*sounds, None]):
            assert torch.equal(model(ids).logits, frozen)
        for name, tensor in handle.state_dict().items():
            if "gate" in name:
                tensor.fill_(1.0)
        with handle.given(audio=[*sounds, None]):
            heard = model(ids).logits
    assert not torch.allclose(heard[0], heard[1])
    assert torch.equal(heard[2], frozen[2])
    with pytest.raises(ConfigError, match=r"encoder takes audio; got image="), handle.given(image=sounds):
        pass


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"is a llama; audio encoders are clap"):
        load_feature_encoder(f"audio:{save_tiny_llama(tmp_path / 'llama')}")
    with pytest.raises(BackboneError, match="cannot be loaded as an encoder of video"):
        load_feature_encoder("video:nobody/nothing")
    made("ast").save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="came without an extractor"):
        load_feature_encoder(tmp_path / "bare").prepare(["a.wav"])
    with pytest.raises(ConfigError, match="bgr is for images"):
        load_feature_encoder(tmp_path / "bare", bgr=True)
