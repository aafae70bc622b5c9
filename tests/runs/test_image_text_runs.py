"""Runs of the tasks caption and science-qa with images: trained, recorded, evaluated again and on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.experts.stubs import registered
from tests.tasks import caption, science_qa
from tests.tiny import save_tiny_llama
from zinit.demo import vit_path
from zinit.errors import ConfigError
from zinit.runs.build import load_run, run_expert
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks.alpaca.template import format_prompt

FIGURES = {
    "caption": {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "caption_rouge_l", "cider_d"},
    "science-qa": {"accuracy", "accuracy_nat", "accuracy_no", "accuracy_g7_12", "unread"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def write(task: str, folder: Path) -> Path:
    if task == "science-qa":
        return science_qa.save(folder)
    caption.draw(folder / "pictures", 12)
    (folder / "dataset.json").write_text(json.dumps(caption.karpathy(12)))
    return folder / "dataset.json"


@pytest.mark.parametrize("task", FIGURES)
def test_trained_and_evaluated_with_images(task: str, model: Path, tmp_path: Path) -> None:
    source = write(task, tmp_path / "data")
    options = ["steps=2", "batch_size=4", "learning_rate=0.02", "warmup_steps=0", "evaluate_every=0", "save_every=0",
               "max_new_tokens=4", f"encoder.cache={tmp_path / 'cache'}"]  # fmt: skip
    given: dict[str, Any] = {"model": str(model), "data": str(source), "encoder": str(vit_path()), "options": options}
    config = resolve(backbone="llama", task=task, method="v1-multimodal", **given)[0]
    results = train_run(config, tmp_path / "run")
    assert set(results["metrics"]) == {"base", "adapted", "shuffled"}
    assert all(FIGURES[task] <= figures.keys() for figures in results["metrics"].values())
    counts = results["counts"]
    if task == "caption":
        assert counts["images_read"] == 12 == counts["images_train"] + counts["images_held_out"] + 3
        assert (counts["train_with_image"], counts["held_out_with_image"], counts["images"]) == (counts["train"], 3, 3)
    else:
        assert counts["read"] == 12 == counts["train"] + counts["held_out"]
        assert (counts["train_with_image"], counts["held_out_with_image"]) == (3, 3)
        assert (counts["answered"], counts["img"]) == (6, 3)
    assert results["metrics"]["adapted"]["loss"] != results["metrics"]["shuffled"]["loss"]
    if task == "caption":
        check_as_expert(tmp_path / "run", tmp_path / "data" / "pictures" / "3.png")
    else:
        check_with_experts(tmp_path / "run")
    other = evaluate_run(tmp_path / "run", data=str(write(task, tmp_path / "other")))
    assert other["metrics"]["adapted"]["loss"] == pytest.approx(results["metrics"]["adapted"]["loss"])


def check_as_expert(run: Path, picture: Path) -> None:
    """A run of captions is an expert for other runs: it says what its model says, word for word."""
    expert = run_expert(f"caption:{run}", device="cpu")
    _, model, tokenizer, handle = load_run(run, torch.device("cpu"))
    for own in (handle, getattr(expert, "handle", handle)):
        for name, parameter in own.state_dict().items():
            if "gate" in name:
                parameter.fill_(5.0)  # two steps have hardly opened them
    image = Image.open(picture)
    said = list(expert([image, Image.effect_noise((8, 8), 90).convert("RGB")]))
    ids = tokenizer(format_prompt("Generate caption of this image"))["input_ids"]
    ids = [tokenizer.bos_token_id, *ids] if ids[0] != tokenizer.bos_token_id else ids
    start = len(ids)
    with torch.no_grad(), handle.given(image=[image]):
        while len(ids) < start + 4 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert said[0] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip() != ""
    assert said[0] != said[1]


def check_with_experts(run: Path) -> None:
    """A finished run can be asked with experts that it was not trained with; a run without captions is none."""
    with registered():
        told = evaluate_run(run, experts="painter:70, repeater", limit=1)["counts"]
    assert (told["held_out_expert_painter"], told["held_out_expert_painter_empty"]) == (2, 1)
    assert (told["held_out_expert_repeater"], told["held_out_expert_repeater_cut"]) == (3, 3)
    with pytest.raises(ConfigError, match=r"'caption' needs a run of the task 'caption'.*of the task 'science-qa'"):
        evaluate_run(run, experts=f"caption:{run}")
