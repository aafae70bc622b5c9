"""ScienceQA's protocol: prompts, read-out and table against known answers, and how its folder is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.shared import SHARED, needs_data
from tests.tasks.science_qa import document, problem, save
from zinit.errors import DataError
from zinit.tasks.science_qa.config import Order
from zinit.tasks.science_qa.problems import Problem, ProblemFolder
from zinit.tasks.science_qa.scoring import categories, read_answer, score_answers
from zinit.tasks.science_qa.template import format_problem

DATA = SHARED / "data" / "scienceqa"
# In percent, and of how many problems; the last column of the stored table is the average.
GPT3 = {
    "accuracy": 71.89,
    "accuracy_nat": 72.87,
    "accuracy_soc": 73.68,
    "accuracy_lan": 68.25,
    "accuracy_txt": 73.11,
    "accuracy_img": 65.60,
    "accuracy_no": 72.15,
    "accuracy_g1_6": 73.62,
    "accuracy_g7_12": 68.60,
}
COUNTS = {"unread": 0, "nat": 129, "soc": 57, "lan": 63, "txt": 119, "img": 125, "no": 79, "g1_6": 163, "g7_12": 86}


@pytest.fixture(scope="module")
def tested() -> list[Problem]:
    return ProblemFolder.of(str(DATA)).take("test")


@pytest.fixture(scope="module")
def gpt3() -> dict[str, Any]:
    return json.loads((DATA / "gpt3_test_QCM-ALE_2_seed_3.json").read_text())


@needs_data
def test_the_table_of_stored_predictions_is_that_of_the_paper_s_script(
    tested: list[Problem], gpt3: dict[str, Any]
) -> None:
    outputs = [f"The answer is {'ABCDE'[gpt3['results'][each.id]]}." for each in tested]
    accuracies, counts = score_answers(tested, outputs)
    assert {name: round(100 * value, 2) for name, value in accuracies.items()} == GPT3
    assert counts == COUNTS


@needs_data
def test_outputs_that_cannot_be_read_are_wrong_and_counted(tested: list[Problem], gpt3: dict[str, Any]) -> None:
    outputs = [gpt3["outputs"][each.id] for each in tested]
    accuracies, counts = score_answers(tested, outputs)
    assert (round(100 * accuracies["accuracy"], 2), counts["unread"]) == (68.67, 17)
    for each, output in zip(tested, outputs, strict=True):
        place = read_answer(output, len(each.choices))
        assert place in (None, gpt3["results"][each.id])  # what the original script made of it


@needs_data
def test_the_original_s_random_choice_is_drawn_by_seed_and_problem(tested: list[Problem], gpt3: dict[str, Any]) -> None:
    outputs = [gpt3["outputs"][each.id] for each in tested]
    first, counts = score_answers(tested, outputs, readout="original", seed=1)
    backwards, _ = score_answers(tested[::-1], outputs[::-1], readout="original", seed=1)
    assert first == backwards
    assert counts["unread"] == 17
    assert 0.6867 < first["accuracy"] <= 0.6867 + 17 / 249
    found = {score_answers(tested, outputs, readout="original", seed=seed)[0]["accuracy"] for seed in range(8)}
    assert len(found) > 1


@needs_data
def test_prompts_are_those_of_llava_s_file_but_for_four_hints_that_it_cuts(tested: list[Problem]) -> None:
    """Its options stand on lines of their own, without brackets, and an empty context is left out."""
    entries = json.loads((DATA / "llava_test_CQM-A.json").read_text())
    stored = {entry["id"]: entry["conversations"][0]["value"].removeprefix("<image>\n") for entry in entries}
    different = []
    for each in tested:
        prompt, options = format_problem(each, "CQM-A")[0].removesuffix("\nAnswer:").split("\nOptions: ")
        prompt = prompt.removeprefix("Context: N/A\n").replace("Question: ", "", 1)
        options = re.sub(r"(?:\A| )\(([A-E])\) ", r"\n\1. ", options)
        if prompt + options != stored[each.id]:
            different.append(each)
    assert [each.id for each in different] == ["42", "209", "600", "1714"]
    for each in different:
        context, cut, _ = each.hint.partition("This Punnett square is")
        assert cut
        assert stored[each.id].startswith(f"Context: {context}\n{each.question}\n")


def example(**changes: Any) -> Problem:
    plain = {
        "id": "1",
        "question": "Who  is it?",
        "choices": ("Ann", "Bob", "Cy"),
        "answer": 1,
        "hint": "It rains.",
        "lecture": "Rain\nfalls.",
        "solution": "Bob is wet.",
        "subject": "natural science",
        "grade": 6,
    }
    return Problem(**{**plain, **changes})


QUESTION, CONTEXT, OPTIONS = "Question: Who is it?", "Context: It rains.", "Options: (A) Ann (B) Bob (C) Cy"
LECTURE, SOLUTION = "Rain\\nfalls.", "Bob is wet."  # a line break is two characters, as in the original


ORDERS: list[tuple[Order, tuple[str, ...], str]] = [
    ("QCM-A", (QUESTION, CONTEXT, OPTIONS), "The answer is B."),
    ("CQM-A", (CONTEXT, QUESTION, OPTIONS), "The answer is B."),
    ("QCM-AL", (QUESTION, CONTEXT, OPTIONS), f"The answer is B. BECAUSE: {LECTURE}"),
    ("QCM-AE", (QUESTION, CONTEXT, OPTIONS), f"The answer is B. BECAUSE: {SOLUTION}"),
    ("QCM-ALE", (QUESTION, CONTEXT, OPTIONS), f"The answer is B. BECAUSE: {LECTURE} {SOLUTION}"),
    ("QCM-AEL", (QUESTION, CONTEXT, OPTIONS), f"The answer is B. BECAUSE: {SOLUTION} {LECTURE}"),
    ("QCM-LA", (QUESTION, CONTEXT, OPTIONS), f"{LECTURE} The answer is B."),
    ("QCM-EA", (QUESTION, CONTEXT, OPTIONS), f"{SOLUTION} The answer is B."),
    ("QCM-LEA", (QUESTION, CONTEXT, OPTIONS), f"{LECTURE} {SOLUTION} The answer is B."),
    ("QCM-ELA", (QUESTION, CONTEXT, OPTIONS), f"{SOLUTION} {LECTURE} The answer is B."),
    ("QCML-A", (QUESTION, CONTEXT, OPTIONS, f"BECAUSE: {LECTURE}"), "The answer is B."),
    ("QCME-A", (QUESTION, CONTEXT, OPTIONS, f"BECAUSE: {SOLUTION}"), "The answer is B."),
    ("QCMLE-A", (QUESTION, CONTEXT, OPTIONS, f"BECAUSE: {LECTURE} {SOLUTION}"), "The answer is B."),
    ("QCLM-A", (QUESTION, CONTEXT, f"BECAUSE: {LECTURE}", OPTIONS), "The answer is B."),
    ("QCEM-A", (QUESTION, CONTEXT, f"BECAUSE: {SOLUTION}", OPTIONS), "The answer is B."),
    ("QCLEM-A", (QUESTION, CONTEXT, f"BECAUSE: {LECTURE} {SOLUTION}", OPTIONS), "The answer is B."),
]


@pytest.mark.parametrize(("order", "lines", "answer"), ORDERS)
def test_every_order_of_the_original_s_template(order: Order, lines: tuple[str, ...], answer: str) -> None:
    assert format_problem(example(), order) == ("\n".join([*lines, "Answer:"]), f" {answer}")


def test_all_orders_are_tested_and_empty_texts_leave_no_trace() -> None:
    assert [row[0] for row in ORDERS] == list(get_args(Order))
    bare = example(hint=" ", lecture="", solution="")
    assert format_problem(bare, "QCM-ALE") == (f"{QUESTION}\nContext: N/A\n{OPTIONS}\nAnswer:", " The answer is B.")
    assert format_problem(bare, "QCM-LA")[1] == " The answer is B."


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("The answer is B.", 1),
        ("The answer is B. BECAUSE: it rains.", 1),
        ("So it is. The answer is C!", 2),
        ("The answer is B, and", 1),  # any character ends it
        ("The answer is B", None),
        ("The answer is b.", None),
        ("B", None),
        ("The answer is A. The answer is A.", None),
        ("The answer is D.", None),  # there are three options
        ("The answer is Bob.", 1),  # as in the original
        ("", None),
    ],
)
def test_an_answer_is_read_where_there_is_exactly_one(output: str, expected: int | None) -> None:
    assert read_answer(output, 3) == expected


def test_categories_overlap_as_in_the_paper_s_table() -> None:
    assert categories(example(has_image=True)) == ("nat", "txt", "img", "g1_6")
    assert categories(example(hint="", grade=7, subject="language science")) == ("lan", "no", "g7_12")
    assert categories(example(hint="", has_image=True, grade=12)) == ("nat", "img", "g7_12")
    assert score_answers([example()], ["The answer is B."])[0] == dict.fromkeys(
        ("accuracy", "accuracy_nat", "accuracy_txt", "accuracy_g1_6"), 1.0
    )


@needs_data
def test_the_real_folder_is_read_whole() -> None:
    folder = ProblemFolder.of(str(DATA), on_bad="skip")
    training, tested = folder.take("val"), folder.take("test")
    report = folder.report("val", "test")
    assert (len(training), len(tested)) == (124, 249)  # images of val are not in the reference data
    assert report["read"] == 502 == len(training) + len(tested) + report["skipped_unusable"]
    assert sum(each.image is not None for each in tested) == sum(each.has_image for each in tested) == 125
    texts = ProblemFolder.of(str(DATA / "problems.json"), images=False).take("val")
    assert (len(texts), sum(each.has_image for each in texts)) == (253, 129)
    assert not any(each.image for each in texts)


def test_counts_in_are_counts_out_plus_skipped(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "p1": {"answer": 5},
        "p3": {"image": "gone.png"},
        "p7": {"choices": ["one"]},
        "p8": {"task": "closed choice", "note": "x"},
        "p9": {"split": "nowhere"},
    }
    problems, splits = document(12, **changes)
    splits["val"] = [splits["train"].pop(0)]
    splits["train"].append("99")
    splits["test"].append(splits["train"][-2])  # the last problem of train is tested on too
    save(tmp_path, problems, splits)
    (tmp_path / "images" / "test" / "11" / "image.png").write_bytes(b"no image")
    folder = ProblemFolder.of(str(tmp_path), on_bad="skip")
    tested = folder.take("test")
    training = folder.take("train", without=[each.id for each in tested])
    report = folder.report("train", "test")
    assert [each.id for each in tested] == ["6", "8", "10", "5"]
    assert [each.id for each in training] == ["2", "4"]
    reasons = folder.reasons
    assert report == {
        "read": 12,
        "skipped_not_in_a_split": 1,
        "skipped_unusable": 4,
        "ids_without_problem": 1,
        "train_ids_also_held_out": 1,
        "not_used": 1,
        "unused_field_note": 1,
    }
    assert len(tested) + len(training) + 1 + 4 + 1 == 12
    expected = ("'9' is in no split", "'answer' is int 5", "gone.png", "1 choices", "no image that can", "names '99'")
    assert all(any(text in reason for reason in reasons) for text in expected), reasons


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r"problem '6': 'answer' is int 4; expected a place in 'choices', 0 to 1.*on_bad=skip"),
        ({"answer": True}, "'answer' is bool true"),
        ({"answer": None}, "has no 'answer'"),
        ({"choices": ["a"]}, "1 choices; expected 2 to 5"),
        ({"choices": list("abcdef")}, "6 choices; expected 2 to 5"),
        ({"choices": ["a", 2]}, "'choices' must be a list of texts"),
        ({"choices": ["a", "\ud800"]}, "half of a surrogate pair"),
        ({"question": ["x"]}, "'question' must be text"),
        ({"hint": 3}, "'hint' must be text"),
        ({"grade": 7}, "'grade' must be grade1 to grade12"),
        ({"subject": None}, "has no 'subject'"),
        ({"image": 5}, "'image' must be a file name"),
        ({"image": "image.png"}, r"there is no image .*images/test/6/image.png.*task.images=false.*on_bad=skip"),
        ({"image": "../../../../secret.png"}, "leaves the folder"),
        ({"image": "a\0b"}, "problem '6'"),
    ],
)
def test_a_problem_that_cannot_be_used_is_one_message(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    problems, splits = document(12, p6=change)
    save(tmp_path, problems, splits, images=False)
    for pid in ("7", "9", "11"):
        problems[pid]["image"] = None
    save(tmp_path, problems, splits, images=False)
    with pytest.raises(DataError, match=f"(?s){message}"):
        ProblemFolder.of(str(tmp_path)).take("test")


@pytest.mark.parametrize(
    ("problems", "splits", "message"),
    [
        ([], {}, "expected an object {id: problem}"),
        ({}, {}, "expected an object {id: problem}"),
        ({"1": problem(1, "test")}, ["1"], r"expected an object {split: \[id, ...\]}"),
        ({"1": problem(1, "test")}, {"test": [1]}, r"expected an object {split: \[id, ...\]}"),
        ({"1": problem(1, "test")}, {"test": []}, r"the problem '1' is in no split of pid_splits.json.*on_bad=skip"),
        ({"2": problem(2, "test")}, {"test": ["2", "3"]}, r"'test' names '3', and problems.json has no such.*on_bad"),
        ({"2": problem(2, "test")}, {"minitest": ["2"]}, "has no split 'test'; it has minitest"),
    ],
)
def test_a_folder_of_another_form_is_one_message(problems: Any, splits: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, problems, splits, images=False)
    with pytest.raises(DataError, match=message):
        ProblemFolder.of(str(tmp_path)).take("test")


def test_a_folder_without_its_files_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*Expected one with problems.json"):
        ProblemFolder.of(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"has no problems.json"):
        ProblemFolder.of(str(tmp_path))
    save(tmp_path)
    (tmp_path / "pid_splits.json").unlink()
    with pytest.raises(DataError, match=r"has no pid_splits.json"):
        ProblemFolder.of(str(tmp_path))
