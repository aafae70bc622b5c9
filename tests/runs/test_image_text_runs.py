"""Runs of the tasks caption and science-qa with images: trained, recorded, evaluated again and on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import caption, science_qa
from tests.tiny import save_tiny_llama
from zinit.demo import vit_path
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import train_run

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
    other = evaluate_run(tmp_path / "run", data=str(write(task, tmp_path / "other")))
    assert other["metrics"]["adapted"]["loss"] == pytest.approx(results["metrics"]["adapted"]["loss"])
