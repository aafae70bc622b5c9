"""Experts in the prompts of tasks: order, budget, counts, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.experts.stubs import Painter, registered
from tests.tasks.science_qa import save
from tests.tiny import byte_tokenizer, save_tiny_llama
from zinit.errors import ConfigError, DataError
from zinit.experts.base import make_expert
from zinit.tasks.base import TaskInputs
from zinit.tasks.experts import Experts, context_lines
from zinit.tasks.science_qa.config import ScienceQAConfig
from zinit.tasks.science_qa.task import ScienceExample, ScienceQA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("model"))).eval()


@pytest.fixture(autouse=True)
def _experts() -> Iterator[None]:
    Painter.shown.clear()
    with registered():
        yield


def task(model: Any, folder: Path, *experts: str, **settings: Any) -> ScienceQA:
    inputs = TaskInputs(model=model, processor=byte_tokenizer(), data=str(folder))
    return ScienceQA(inputs, ScienceQAConfig(images=False, experts=experts, **settings))


def context(example: Any) -> str:
    return example.prompt.split("\nContext: ")[1].split("\nOptions: ")[0]


def test_their_lines_stand_above_the_hint_in_order_within_the_budget(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Problems 6 to 11 are held out; 7, 9, 11 have images with red 63, 81, 99, and 9 has no hint."""
    t = task(model, save(tmp_path), "repeater", "painter:70", expert_tokens=30)
    asked = "It was asked: Which is number {0}? Which is"  # 27 bytes, which are tokens: the next word does not fit
    assert [context(example) for example in t.held_out_examples] == [
        "N/A",
        f"{asked.format(7)}\nOne of them is number 7.",
        "One of them is number 8.",
        f"{asked.format(9)}\nThe colour: red 81",
        "One of them is number 10.",
        "It was asked: Which is number 11? Which is\nThe colour: red 99\nOne of them is number 11.",
    ]
    plain = task(model, tmp_path)
    assert [e.ids for e in t.train_examples] == [e.ids for e in plain.train_examples]  # at inference alone
    assert not any("expert" in name for name in plain.data_report())
    counts = {name: count for name, count in t.data_report().items() if "expert" in name}
    assert counts == {
        **{"held_out_expert_repeater": 3, "held_out_expert_repeater_cut": 3, "held_out_expert_repeater_empty": 0},
        **{"held_out_expert_painter": 2, "held_out_expert_painter_cut": 0, "held_out_expert_painter_empty": 1},
    }
    assert Painter.shown == [63, 81, 99]
    told = [example.problem for example in t.held_out_examples if isinstance(example, ScienceExample)]
    assert told[3].hint == ""  # it counts as a problem without a hint
    assert t.fingerprint() != plain.fingerprint()


def test_an_image_is_shown_once(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tmp_path)
    images = tmp_path / "images" / "test"
    (images / "9" / "image.png").write_bytes((images / "7" / "image.png").read_bytes())
    t = task(model, tmp_path, "painter", "repeater")
    assert Painter.shown == [63, 99]
    assert context(t.held_out_examples[3]).startswith("The colour: red 63\nIt was asked: Which is number 9? Which")
    experts, asked = Experts([make_expert("painter")]), [([images / "11" / "image.png"], "Which?")]
    Painter.shown.clear()
    assert experts(asked) == experts(asked) == [(("painter", "The colour", "red 99"),)]
    assert Painter.shown == [99]
    both = [images / "11" / "image.png", images / "7" / "image.png"]
    assert experts([(both, "Which?"), ([], "?")]) == [
        (("painter", "The colour", "red 99; red 63"),),
        (("painter", "The colour", ""),),
    ]


def test_without_room_they_are_left_out_and_counted_and_the_hint_stays(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tmp_path)
    longest = max(len(example.ids) for example in task(model, tmp_path).held_out_examples)
    t = task(model, tmp_path, "repeater", max_length=longest)
    counts = t.data_report()
    left_out = counts["held_out_experts_left_out"]
    assert 0 < left_out <= 3
    assert (counts["held_out"], counts["held_out_hint_cut"], counts["held_out_truncated"]) == (6, 0, 0)
    assert sum("It was asked" in example.prompt for example in t.held_out_examples) == 3 - left_out


def test_a_text_is_cut_between_words_where_there_are_some() -> None:
    tokenizer = byte_tokenizer()
    for text, budget, kept in [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one, two", 4, "one"),
        ("onetwothree", 4, "onet"),
        ("€€€", 5, "€"),  # three bytes each: never half a character
        ("€€€", 2, ""),
    ]:
        lines, counts = context_lines((("ocr", "Text", text),), tokenizer, budget)
        assert lines == (f"Text: {kept}" if kept else "")
        assert counts["expert_ocr_cut"] == (kept != text)
        assert counts["expert_ocr_empty"] == 0


def test_one_that_fails_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(
        DataError, match=r"expert 'broken' failed on .*image\.png and 2 more: RuntimeError: the index is"
    ):
        task(model, tmp_path, "painter", "broken")
    with pytest.raises(DataError, match=r"expert 'broken' must give a text for each of 3 images.*got \[None"):
        task(model, tmp_path, "broken:1")


def test_wrong_settings_are_one_message() -> None:
    with pytest.raises(ConfigError, match=r"no expert named 'paniter'\. Did you mean 'painter'"):
        ScienceQAConfig(experts=("paniter:3",))
    with pytest.raises(ConfigError, match=r"experts has 'painter' 2 times"):
        ScienceQAConfig(experts=("painter", "painter"))
    with pytest.raises(ConfigError, match=r"expert_tokens must be a whole number of at least 1; got 0"):
        ScienceQAConfig(expert_tokens=0)
