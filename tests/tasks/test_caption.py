"""The task caption: every caption is trained on, every image is asked once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.tasks import caption as made
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import ConfigError, DataError
from zinit.tasks.base import TaskInputs
from zinit.tasks.caption.config import CaptionConfig
from zinit.tasks.caption.task import Caption, CaptionExample
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator

START = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PROMPT = f"{START}\n\n### Instruction:\nGenerate caption of this image\n\n### Response:"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()


def task(model: Any, source: Path | None, *, train: bool = True, seed: int = 0, **settings: Any) -> Caption:
    data = None if source is None else str(source)
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), data=data, train=train, seed=seed)
    return Caption(inputs, CaptionConfig(**{"images": False, **settings}))


def karpathy(folder: Path, count: int = 8) -> Path:
    made.draw(folder / "pictures", count)
    (folder / "dataset.json").write_text(json.dumps(made.karpathy(count)))
    return folder / "dataset.json"


def lines(folder: Path, count: int = 20) -> Path:
    made.draw(folder, count)
    (folder / "captions.jsonl").write_text(made.lines(count))
    return folder / "captions.jsonl"


def captions(numbers: Any) -> list[str]:
    return [text for number in numbers for text in made.captions(number)]


def check_counts(counts: dict[str, Any]) -> None:
    """What was read is what came out plus what was skipped."""
    for what in ("images", "captions"):
        out = [counts.get(f"{what}_{name}", 0) for name in ("train", "held_out", "not_used", "skipped")]
        assert counts[f"{what}_read"] == sum(out) + counts[f"{what}_train_skipped_also_held_out"], counts
    parts = {"captions_train": "train", "images_held_out": "held_out"}
    for read, part in parts.items():
        assert counts[read] == counts[part] + counts[f"{part}_skipped_prompt_too_long"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_karpathy_s_parts_are_kept(split: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, karpathy(tmp_path), split=split)
    assert [example.response for example in t.train_examples] == captions([0, 1, 4, 5])  # train and restval
    asked = [example for example in t.held_out_examples if isinstance(example, CaptionExample)]
    numbers = [2, 6] if split == "val" else [3, 7]
    assert [list(example.references) for example in asked] == [made.captions(number) for number in numbers]
    counts = t.data_report()
    check_counts(counts)
    assert (counts["held_out_part"], counts["images_not_used"]) == (split, 2)
    assert (counts["train_images_left_out"], counts["held_out_images_left_out"]) == (len(t.train_examples), 2)


def test_tokens_are_alpaca_s_prompt_and_one_caption(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, karpathy(tmp_path))
    for example in t.train_examples:
        assert t.tokenizer.decode(example.ids[1 : example.prompt_length]) == PROMPT == example.prompt
        assert t.tokenizer.decode(example.ids[example.prompt_length : -1]) == example.response
    other = task(model, karpathy(tmp_path), instruction="Say what you see")
    assert other.held_out_examples[0].prompt == PROMPT.replace("Generate caption of this image", "Say what you see")
    assert Caption.format_prompt("Generate caption of this image") == PROMPT


def test_without_parts_images_are_held_out_by_the_seed(model: LlamaForCausalLM, tmp_path: Path) -> None:
    source, held = lines(tmp_path), []
    for seed in (0, 0, 1):
        t = task(model, source, seed=seed, held_out=2)
        held.append([example.images or example.response for example in t.held_out_examples])
        own = {example.references[0] for example in t.held_out_examples if isinstance(example, CaptionExample)}
        assert not own & {example.response for example in t.train_examples}
        check_counts(t.data_report())
    assert held[0] == held[1] != held[2]
    assert len(held[0]) == 2


def test_an_image_that_is_tested_on_is_not_trained_on(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Whatever its name is there."""
    source = lines(tmp_path, 6)
    shutil.copy(tmp_path / "2.png", tmp_path / "copy.png")
    other = tmp_path / "held_out.json"
    other.write_text(json.dumps([{"image": name, "caption": "Other."} for name in ("./1.png", "copy.png")]))
    t = task(model, source, held_out_data=str(other))
    assert [example.response for example in t.train_examples] == captions([0, 3, 4, 5])
    counts = t.data_report()
    check_counts(counts)
    assert (counts["images_train_skipped_also_held_out"], counts["captions_train_skipped_also_held_out"]) == (2, 5)
    alone = task(model, source, held_out_data=str(other), train=False)
    assert (len(alone.train_examples), len(alone.held_out_examples)) == (0, 2)
    check_counts(alone.data_report())


def test_skipped_entries_and_long_texts_are_counted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    made.draw(tmp_path)
    rows = [{"image": f"{n}.png", "captions": [f"It is {n}.", ""]} for n in range(5)]
    rows[1]["captions"] = ["x" * 300]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"image": "gone.png", "captions": ["a", "b"]}]))
    t = task(model, tmp_path / "a.json", on_bad="skip", max_length=300)
    counts = t.data_report()
    check_counts(counts)
    assert (counts["images_read"], counts["captions_read"]) == (6, 11)
    assert (counts["images_skipped"], counts["captions_skipped"]) == (1, 6)
    assert counts["train_truncated"] + counts["held_out_truncated"] == 1
    assert "gone.png" in " ".join(counts["reasons"])


def test_answers_are_scored_against_all_captions(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, karpathy(tmp_path, 20))
    examples = t.held_out_examples
    right = t.score(examples, [made.captions(number)[-1] for number in (3, 7, 11, 15, 19)])
    assert right.counts == {"images": 5}
    assert set(right.metrics) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "caption_rouge_l", "cider_d"}
    assert right.metrics["bleu_4"] == right.metrics["caption_rouge_l"] == pytest.approx(1.0)
    wrong = t.score(examples, ["" for _ in examples])
    assert set(wrong.metrics.values()) == {0.0}
    letters = task(model, karpathy(tmp_path, 20), tokens="characters")
    assert letters.score(examples, ["A" for _ in examples]).metrics["bleu_1"] > 0.0


def test_an_evaluation_asks_once_for_each_image(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, karpathy(tmp_path, 20), max_new_tokens=4)
    found = t.evaluate(make_accelerator(TrainConfig()), limit=3)
    assert found.counts == {"answered": 3, "images": 3}
    assert t.metric in found.metrics
    assert [sample["expected"] for sample in found.samples] == [made.captions(number)[0] for number in (3, 7, 11)]


def test_what_cannot_be_is_one_message(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"caption has no data of its own.*--data"):
        task(model, None)
    with pytest.raises(ConfigError, match=r"have images, and the method takes none.*v1-multimodal.*task.images=false"):
        task(model, karpathy(tmp_path), images=True)
    made.draw(tmp_path, 1)
    (tmp_path / "one.jsonl").write_text(made.lines(1))
    with pytest.raises(DataError, match="holds 1 image; at least 2 are needed"):
        task(model, tmp_path / "one.jsonl")
    (tmp_path / "train.json").write_text(json.dumps({"images": made.karpathy(1)["images"]}))
    with pytest.raises(DataError, match=r"no image of the part 'test'; it has train.*task.split="):
        task(model, tmp_path / "train.json")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs Java"):
        Caption.read_data(TaskInputs(model=model, data="x"), CaptionConfig(meteor=True))
