"""The embedded demo's pictures, and the Vision Transformer and CLIP that were pretrained on pictures like them."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from zinit import demo
from zinit.demo import images, scenes
from zinit.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Pairs = list[tuple[Image.Image, int]]
ZERO_SHOT = (0.4, 0.75)
"""The band in which CLIP's accuracy on the demo's base-to-novel task has to lie, prefix or not: 24 classes."""


def digest(pairs: Pairs) -> str:
    """Of all pixels and labels, in order."""
    return hashlib.sha256(b"".join(picture.tobytes() + bytes([label]) for picture, label in pairs)).hexdigest()


def contents(pairs: Pairs) -> set[bytes]:
    return {picture.tobytes() for picture, _ in pairs}


def some_scenes(seed: int, number: int = 200, plain: float = 0) -> list[tuple[scenes.Scene, bytes]]:
    return [(scene, picture.tobytes()) for scene, picture in islice(scenes.scenes(seed, plain), number)]


# --- pictures ------------------------------------------------------------------------------------------------------


def test_pictures_are_a_function_of_the_seed() -> None:
    assert some_scenes(3, 20) == some_scenes(3, 20)
    assert some_scenes(3, 20) != some_scenes(4, 20)
    for make in (images.textures, images.counts):
        assert digest(make(1, 24)[1]) == digest(make(1, 24)[1])
        assert digest(make(1, 24)[1]) != digest(make(2, 24)[1])
    assert digest(images.drawings(1)[1]["test"][:24]) != digest(images.drawings(2)[1]["test"][:24])


@pytest.mark.integration
def test_hash_randomisation_does_not_reach_the_pictures() -> None:
    code = (
        "import hashlib; from zinit.demo import images;"
        "pairs = images.textures(0, 24)[1] + images.counts(0, 24)[1];"
        "print(hashlib.sha256(b''.join(picture.tobytes() for picture, _ in pairs)).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    outputs = {subprocess.check_output(run, env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")}
    assert len(outputs) == 1


@pytest.mark.integration
def test_importing_the_demo_loads_no_torch() -> None:
    code = (
        "import sys; from zinit import demo; demo.labelled_images('textures'); demo.base_to_novel();"
        "demo.vit_path(), demo.clip_path(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("dataset", "classes", "total"), [("digits", 10, 1797), ("textures", 12, 1800), ("counts", 6, 1800)]
)
def test_a_task_has_the_splits_of_vtab(dataset: str, classes: int, total: int) -> None:
    names, splits = demo.labelled_images(dataset)
    assert len(names) == len(set(names)) == classes
    assert {split: len(pairs) for split, pairs in splits.items()} == {
        "train800": 800,
        "val200": 200,
        "test": total - 1000,
    }
    assert (
        sum(len(contents(pairs)) for pairs in splits.values())
        == total
        == len(set().union(*map(contents, splits.values())))
    )
    for pairs in splits.values():
        assert {(picture.size, picture.mode) for picture, _ in pairs} == {((32, 32), "RGB")}
        share = Counter(label for _, label in pairs)
        assert sorted(share) == list(range(classes))
        assert max(share.values()) < 2.5 * min(share.values())
    assert digest(splits["val200"]) == digest(demo.labelled_images(dataset)[1]["val200"])


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    originals = load_digits()
    known = {
        tuple((values * 255 / 16).round().astype(int)): label
        for values, label in zip(originals.data, originals.target, strict=True)
    }
    for picture, label in demo.labelled_images("digits")[1]["val200"][:50]:
        grey = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=int).ravel()
        nearest = min(known, key=lambda values: np.abs(np.array(values) - grey).sum())
        assert known[nearest] == label


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"digts.*digits"):
        demo.labelled_images("digts")


def test_counts_shows_as_many_objects_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a plain ground without noise nearly every object is one connected spot."""
    from scipy.ndimage import label as spots

    flat = np.zeros((32, 32), np.float32)
    for name in images.TEXTURES:
        monkeypatch.setitem(images.TEXTURES, name, lambda rng: flat)
    monkeypatch.setattr(scenes, "finish", lambda picture, rng: np.rint(picture.clip(0, 1) * 255).astype(np.uint8))
    off: list[int] = []
    for picture, label in images.counts(0, 60)[1]:
        pixels = np.asarray(picture).astype(int)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        found = spots(np.abs(pixels - ground).sum(-1) > 110, np.ones((3, 3)))[1]
        off.append(found - (label + 1))
    assert off.count(0) >= 0.9 * len(off)
    assert max(map(abs, off)) <= 1


def test_places_do_not_overlap() -> None:
    rng = scenes.stream("test", 0)
    for count in range(1, 7):
        for _ in range(20):
            places = scenes.places(count, (3, 9), rng)
            assert len(places) == count
            for i, (x, y, radius) in enumerate(places):
                assert radius <= min(x, y, 32 - x, 32 - y)
                assert all(np.hypot(x - a, y - b) > radius + r for a, b, r in places[:i])


def test_scenes_use_every_attribute_and_captions_tell_the_truth() -> None:
    rng = scenes.stream("test", 0)
    seen = [set() for _ in scenes.ATTRIBUTES]
    for scene, _ in some_scenes(0, 600):
        for values, label in zip(seen, scene.labels(), strict=True):
            values.add(label)
        words = scenes.caption(scene, rng).rstrip(".").replace("-", " ").split()
        assert scene.shape in words or (scene.count > 1 and any(word.startswith(scene.shape) for word in words))
        told = words[: words.index("background") - 1] if "background" in words else words
        assert set(told) & set(scenes.COLOURS) <= {scene.colour}
        assert set(told) & set(scenes.SIZES) <= {scene.size}
        assert set(told) & (set(scenes.PATTERNS) - {"plain"}) <= {scene.pattern}
        assert set(words) & {"two", "three", "four"} <= {("", "two", "three", "four")[scene.count - 1]}
    assert [len(values) for values in seen] == [len(names) for names in scenes.ATTRIBUTES.values()]
    assert all(scene.pattern == scene.background == "plain" and scene.count == 1 for scene, _ in some_scenes(0, 50, 1))


def test_the_tasks_are_new_to_the_pretrained_models() -> None:
    assert not set(images.NEW_SHAPES) & set(scenes.SHAPES)
    assert not set(images.TEXTURES) & {*scenes.PATTERNS, *scenes.BACKGROUNDS}
    assert images.MOST > scenes.MAX_COUNT


def test_base_to_novel_is_balanced_and_split() -> None:
    names, splits = demo.base_to_novel()
    assert names == sorted(set(names))
    assert 16 <= len(names) <= 24
    assert all(colour in scenes.COLOURS and shape in scenes.SHAPES for colour, shape in map(str.split, names))
    for split, number in (("train", 24), ("test", 40)):
        assert Counter(label for _, label in splits[split]) == dict.fromkeys(range(len(names)), number)
    assert not contents(splits["train"]) & contents(splits["test"])
    assert digest(splits["train"]) == digest(demo.base_to_novel()[1]["train"])


def test_the_module_writes_the_layout_of_vtab(tmp_path: Path) -> None:
    images.write_vtab(tmp_path, "digits")
    _, splits = demo.labelled_images("digits")
    splits["train800val200"] = splits["train800"] + splits["val200"]
    assert {file.stem for file in (tmp_path / "digits").glob("*.txt")} == set(splits)
    for split, pairs in splits.items():
        lines = (tmp_path / "digits" / f"{split}.txt").read_text().splitlines()
        assert lines == [f"images/{split}/{i:06}.png {label}" for i, (_, label) in enumerate(pairs)]
        assert len(list((tmp_path / "digits" / "images" / split).iterdir())) == len(pairs)
        for line, (picture, _) in list(zip(lines, pairs, strict=True))[::100]:
            assert Image.open(tmp_path / "digits" / line.split()[0]).tobytes() == picture.tobytes()


# --- the shipped models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [demo.vit_path(), demo.clip_path()])
def test_the_shipped_files_are_small_and_float16(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


@torch.inference_mode()
def test_timm_loads_the_trunk_and_it_has_learned() -> None:
    """A linear map of its features, fitted on 300 scenes, tells backgrounds apart; the same of random weights less."""
    import timm
    from sklearn.linear_model import LogisticRegression

    from scripts.pretrain_vit import normalized

    shown, pictures = zip(*islice(scenes.scenes(99), 400), strict=True)
    labels = np.array([scene.labels()[list(scenes.ATTRIBUTES).index("background")] for scene in shown])
    shares: list[float] = []
    for pretrained in (True, False):
        torch.manual_seed(0)
        backbone = timm.create_model(f"local-dir:{demo.vit_path()}", pretrained=pretrained, num_classes=0).eval()
        features = backbone(normalized(list(pictures))).numpy()
        assert features.shape == (400, backbone.num_features)
        probe = LogisticRegression(max_iter=300).fit(features[:300], labels[:300])
        shares.append(float(probe.score(features[300:], labels[300:])))
    assert tuple(backbone.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert shares[0] > 0.8
    assert shares[0] > shares[1] + 0.2


def test_zero_shot_clip_is_above_chance_and_far_from_perfect() -> None:
    """As loaded by name from the folder: processor, tokenizer and model."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    from scripts.pretrain_clip import pixels, zero_shot_accuracy

    model = CLIPModel.from_pretrained(demo.clip_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.clip_path())
    processor = CLIPImageProcessor.from_pretrained(demo.clip_path())
    names, splits = demo.base_to_novel()
    pictures, labels = zip(*splits["test"], strict=True)
    batch = processor(list(pictures), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, pixels([np.asarray(picture) for picture in pictures]), atol=1e-5, rtol=0)
    share = zero_shot_accuracy(model, tokenizer, names, batch, torch.tensor(labels))
    assert ZERO_SHOT[0] < share < ZERO_SHOT[1]


def test_clips_tokenizer_ends_every_text_and_knows_the_captions_words() -> None:
    from transformers import AutoTokenizer

    from scripts.pretrain_clip import CONTEXT

    tokenizer = AutoTokenizer.from_pretrained(demo.clip_path())
    batch = tokenizer(["A photo of a red star.", "x", "naïve 🦙 " * 40], padding=True, truncation=True)["input_ids"]
    assert {len(ids) for ids in batch} == {CONTEXT}
    assert all(ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids for ids in batch)
    assert tokenizer.decode(batch[0], skip_special_tokens=True).strip() == "a photo of a red star."
    for word in (*scenes.SHAPES, *scenes.COLOURS, *scenes.PATTERNS):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_the_text_features_are_those_of_the_first_end() -> None:
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(demo.clip_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.clip_path())
    with torch.inference_mode():
        alone = model.text_model(**tokenizer(["a red star"], return_tensors="pt")).pooler_output
        padded = model.text_model(
            **tokenizer(["a red star", "a picture of two dotted blue hearts"], padding=True, return_tensors="pt")
        ).pooler_output[:1]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-4)


# --- pretraining ---------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("which", ["vit", "clip"])
def test_pretraining_is_deterministic(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"scripts.pretrain_{which}")
    monkeypatch.setattr(module, "islice", lambda source, size: islice(source, min(size, 200)))  # less of all data
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    try:
        for name in ("one", "same"):
            module.pretrain(tmp_path / name, steps=3, batch_size=4, peak=1e-3, seed=0)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
    shipped = demo.vit_path() if which == "vit" else demo.clip_path()
    assert files(tmp_path / "one") == files(tmp_path / "same")
    assert set(files(tmp_path / "one")) == set(files(shipped))
    assert files(tmp_path / "one")["model.safetensors"] != files(shipped)["model.safetensors"]
