"""The task science-qa: what is asked, what is cut, and how answers are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.tasks.science_qa import document, save
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import ConfigError, DataError
from zinit.tasks.base import TaskInputs
from zinit.tasks.science_qa.config import ScienceQAConfig
from zinit.tasks.science_qa.task import ScienceExample, ScienceQA
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()


def task(model: Any, folder: Path | None, *, train: bool = True, seed: int = 0, **settings: Any) -> ScienceQA:
    data = None if folder is None else str(folder)
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), data=data, train=train, seed=seed)
    return ScienceQA(inputs, ScienceQAConfig(**{"images": False, **settings}))


def check_counts(counts: dict[str, Any]) -> None:
    """What was read is what came out plus what was skipped."""
    parts = [counts[f"{p}{kind}"] for p in ("train", "held_out") for kind in ("", "_skipped_prompt_too_long")]
    others = ("not_used", "skipped_unusable", "skipped_not_in_a_split", "train_skipped_also_held_out")
    assert counts["read"] == sum(parts) + sum(counts.get(name, 0) for name in others), counts


def test_a_problem_is_asked_as_by_its_authors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, save(tmp_path))
    example = t.train_examples[1]
    prompt = (
        "Question: Which is number 1?\nContext: One of them is number 1.\n"
        "Options: (A) number 1 (B) number 2 (C) number 3\nAnswer:"
    )
    assert example.prompt == prompt == t.tokenizer.decode(example.ids[1 : example.prompt_length])
    assert t.tokenizer.decode(example.ids[example.prompt_length : -1]) == " The answer is B."
    assert (len(t.train_examples), len(t.held_out_examples)) == (6, 6)
    counts = t.data_report()
    check_counts(counts)
    assert counts["train_images_left_out"] == counts["held_out_images_left_out"] == 3
    explained = task(model, save(tmp_path), order="QCM-ALE").train_examples[1]
    assert explained.prompt == prompt
    assert explained.response == "The answer is B. BECAUSE: Numbers count.\\nThey go on. It is 1."


def test_a_long_hint_is_cut_from_the_left_and_options_never(model: LlamaForCausalLM, tmp_path: Path) -> None:
    words = [f"w{number:03}" for number in range(100)]
    folder = save(tmp_path, *document(12, p2={"hint": " ".join(words)}, p4={"question": "q" * 400}))
    t = task(model, folder, max_length=200)
    counts = t.data_report()
    check_counts(counts)
    assert (counts["train_hint_cut"], counts["train_skipped_prompt_too_long"], counts["train_truncated"]) == (1, 1, 0)
    (cut,) = [e for e in t.train_examples if isinstance(e, ScienceExample) and e.problem.id == "2"]
    context = cut.prompt.split("\nContext: ")[1].split("\nOptions: ")[0].split(" ")
    assert context == words[-len(context) :]
    assert 200 - len("w000 ") < len(cut.ids) <= 200  # one more word would not fit
    assert "Options: (A) number 2 (B) number 3 (C) number 4 (D) number 5\nAnswer:" in cut.prompt
    assert cut.problem.hint == " ".join(words)  # it counts as a problem with a hint
    long = task(model, folder, max_length=220, order="QCM-ALE")
    assert long.data_report()["train_hint_cut"] == 1  # an explanation is cut at its end; no hint makes room for it
    assert long.data_report()["train_truncated"] > 0


def test_answers_are_scored_by_category_and_unread_ones_counted(model: LlamaForCausalLM, tmp_path: Path) -> None:
    t = task(model, save(tmp_path))
    right = [example.response for example in t.held_out_examples]
    found = t.score(t.held_out_examples, ["I do not know", *right[1:]])
    assert found.metrics["accuracy"] == pytest.approx(5 / 6)
    assert found.metrics["unread"] == pytest.approx(1 / 6)
    assert (found.metrics["accuracy_img"], found.metrics["accuracy_nat"]) == (1.0, 0.5)
    assert (found.counts["unread"], found.counts["img"], found.counts["nat"]) == (1, 3, 2)
    unread = ["?"] * 6
    assert t.score(t.held_out_examples, unread).metrics["accuracy"] == 0.0
    drawn = [
        task(model, tmp_path, readout="original", seed=seed).score(t.held_out_examples, unread).metrics["accuracy"]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert ScienceQA.direction("unread") == "lower"
    assert ScienceQA.direction("accuracy_img") == "higher"


def test_an_evaluation_answers_in_words(model: LlamaForCausalLM, tmp_path: Path) -> None:
    found = task(model, save(tmp_path), max_new_tokens=4).evaluate(make_accelerator(TrainConfig()), limit=2)
    assert (found.counts["answered"], found.counts["unread"], found.metrics["accuracy"]) == (2, 2, 0.0)
    assert found.samples[0]["expected"] == "The answer is A."


def test_splits_and_folders_can_be_chosen(model: LlamaForCausalLM, tmp_path: Path) -> None:
    here, there = save(tmp_path / "here"), save(tmp_path / "there", *document(20))
    t = task(model, here, train_split="test", split="train")
    assert t.train_examples[0].prompt.startswith("Question: Which is number 6?")
    wider = save(tmp_path / "wider", *document(24))
    both = task(model, wider, held_out_data=str(there))
    counts = both.data_report()
    check_counts(counts)
    assert (len(both.train_examples), len(both.held_out_examples)) == (10, 10)
    assert counts["train_skipped_also_held_out"] == 2  # ids 10 and 11
    alone = task(model, here, held_out_data=str(there), train=False)
    assert (len(alone.train_examples), len(alone.held_out_examples)) == (0, 10)
    check_counts(alone.data_report())


def test_skipped_problems_are_counted_with_their_reasons(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tmp_path, *document(12, p2={"answer": 9}, p8={"choices": []}))
    counts = task(model, tmp_path, on_bad="skip").data_report()
    check_counts(counts)
    assert counts["skipped_unusable"] == 2
    assert [("problem '2'" in reason, "problem '8'" in reason) for reason in counts["reasons"]] == [
        (False, True),
        (True, False),
    ]


def test_what_cannot_be_is_one_message(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(ConfigError, match=r"science-qa has no data of its own.*--data FOLDER"):
        task(model, None)
    with pytest.raises(DataError, match=r"nothing is left to train on.*also_held_out.*task.train_split="):
        task(model, folder, train_split="test")
    with pytest.raises(DataError, match="has no split 'dev'; it has train, val, test"):
        task(model, folder, split="dev")
    with pytest.raises(ConfigError, match=r"have images, and the method takes none.*task.images=false"):
        task(model, folder, images=True)
