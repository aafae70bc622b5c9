"""The experts themselves: what they keep, what they say, what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from tests.shared import SHARED, needs_data
from tests.tiny import byte_tokenizer
from zinit.errors import BackboneError, ConfigError
from zinit.experts import EXPERTS
from zinit.experts.base import make_expert
from zinit.experts.detection import count_labels

IMAGES = [Image.new("RGB", (32, 32), "red"), Image.effect_noise((32, 32), 90).convert("RGB")]


def test_ocr_keeps_what_is_sure_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[np.ndarray] = []

    class RapidOCR:
        def __init__(self, params: dict[str, Any]) -> None:
            self.found = iter(
                [
                    SimpleNamespace(
                        txts=("Audi", "à", " b ", "Solution B", "Cola"), scores=(0.95, 0.99, 0.99, 0.9, 0.8)
                    ),
                    SimpleNamespace(txts=None, scores=None),
                ]
            )

        def __call__(self, image: np.ndarray) -> Any:
            taken.append(image)
            return next(self.found)

    for name, content in (("rapidocr", {"RapidOCR": RapidOCR}), ("onnxruntime", {})):
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert make_expert("ocr")(IMAGES) == ["Audi, Solution B", ""]
    assert taken[0][0, 0].tolist() == [0, 0, 255]  # blue, green, red


@needs_data
def test_ocr_reads_the_labels_of_diagrams() -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    page = Image.open(SHARED / "data" / "scienceqa" / "images" / "test" / "1014" / "image.png").convert("RGB")
    (text,) = make_expert("ocr")([page])
    assert text == "Solvent volume: 20 mL, Solvent volume: 20 mL, Solution A, Solution B"


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_extra_is_named_with_its_install_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"needs the packages rapidocr and onnxruntime.*pip install -e '\.\[ocr\]'"):
        make_expert("ocr")


def test_a_captioner_says_what_its_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinit.experts.caption.LONGEST", 8)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "sep_token_id": 1, "pad_token_id": 2}
    text = {**shape, **tokens, "vocab_size": 264, "encoder_hidden_size": 16, "initializer_range": 0.5}
    vision = {**shape, "image_size": 32, "patch_size": 16, "initializer_range": 0.5}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    said = make_expert(f"caption:{tmp_path}")(IMAGES)
    for image, caption in zip(IMAGES, said, strict=True):
        pixels, ids = processor(images=[image], return_tensors="pt")["pixel_values"], [0]
        while len(ids) < 12 and (len(ids) == 1 or ids[-1] != 1):
            logits = model(pixel_values=pixels, input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        whole = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert caption
        assert whole.startswith(caption)
    assert said[0] != said[1]


def test_a_detector_counts_what_its_model_finds(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    labels = {"id2label": {0: "dog", 1: "glass"}, "label2id": {"dog": 0, "glass": 1}}
    config = YolosConfig(**shape, **labels, image_size=[32, 32], patch_size=16, num_detection_tokens=3)
    model = YolosForObjectDetection(config)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    head = model.class_labels_classifier.layers[-1]

    def say(dog: float, glass: float, nothing: float) -> list[str]:
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([dog, glass, nothing]))
        model.save_pretrained(tmp_path)
        return list(make_expert(f"detection:{tmp_path}")(IMAGES))

    assert say(9.0, 0.0, 0.0) == ["three dogs"] * 2
    assert say(0.0, 9.0, 0.0) == ["three glasses"] * 2
    assert say(0.0, 0.0, 9.0) == ["", ""]
    assert say(0.6, 0.0, -9.0) == ["", ""]  # 0.65: not sure enough


def test_objects_are_counted_in_words() -> None:
    assert count_labels(["dog", "ball", "dog"]) == "two dogs, one ball"
    assert count_labels(["person", "wine glass", "person", "wine glass", "sheep", "sheep"]) == (
        "two people, two wine glasses, two sheep"
    )
    assert count_labels(["bus"] * 11) == "11 buses"
    assert count_labels([]) == ""


def test_search_calls_a_function_with_image_and_question() -> None:
    assert make_expert("search:tests.experts.stubs:find")(IMAGES, ["a", "b"]) == ["a (32, 32)", "b (32, 32)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("orc", r"no expert named 'orc'\. Did you mean 'ocr'"),
        ("ocr:english", r"'ocr' takes nothing behind a colon; got 'ocr:english'"),
        ("caption", r"caption:RUN, or caption:FOLDER_OR_HUB_ID"),
        ("detection", r"detection:FOLDER_OR_HUB_ID"),
        ("search", r"search:MODULE:FUNCTION; got 'search'"),
        ("search:json", r"search:MODULE:FUNCTION; got 'search:json'"),
        ("search:no.such:find", r"cannot import 'no.such:find': No module named 'no'.*PYTHONPATH"),
        ("search:json:lode", r"cannot import 'json:lode'"),
        ("search:json:__name__", r"'json:__name__' is a str; the expert 'search' needs a function"),
    ],
)
def test_what_cannot_be_is_one_message(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_expert(words)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    for name in ("caption", "detection"):
        with pytest.raises(BackboneError, match=r"holds no model: it has no config\.json"):
            make_expert(f"{name}:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BackboneError, match=r"cannot be loaded as an object-detection model"):
        make_expert(f"detection:{tmp_path}")


@pytest.mark.parametrize("name", sorted(EXPERTS.shipped))
def test_each_says_what_a_prompt_needs(name: str) -> None:
    expert = EXPERTS.get(name)
    assert expert.name == name
    assert expert.line == expert.line.strip(" :") != ""
    assert len({EXPERTS.get(other).line for other in EXPERTS.shipped}) == len(EXPERTS.shipped)
    assert isinstance(expert.by_question, bool)
