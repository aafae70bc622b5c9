"""Suites of questions about images: their layouts, and hand-made answers with known scores for every rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.suites import made
from zinit.errors import ConfigError, DataError
from zinit.suites import SUITES
from zinit.suites.base import read_yes_no
from zinit.suites.mmbench import MMBench, read_option
from zinit.suites.mme import COGNITION, PERCEPTION, Mme
from zinit.suites.pope import Pope
from zinit.suites.vqa import Vqa


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        *(("Yes", True), ("no", False), ("No.", False), (" y", True), ("N.", False), ("yes, it is", True)),
        *(("not at all", False), ("nothing", False), ("...yes", True), ("x no", False), ("x yes", None)),  # four
        *(("Oh no", None), ("It is, yes", None), ("1", None), ("", None), ("maybe", None)),
    ],
)
def test_yes_and_no_are_read_in_the_first_four_characters(output: str, expected: bool | None) -> None:
    assert read_yes_no(output) is expected


def test_mme_scores_questions_and_images(tmp_path: Path) -> None:
    suite = Mme(made.mme(tmp_path))
    assert [q.text for q in suite.questions[:2]] == ["Is it 0? Please answer yes or no.", "Is it 1?"]
    assert suite.counts == {"subtasks": 2, "questions": 8, "images_without_questions": 0, "folders_not_used": 0}
    found = suite.score(["Yes", "No", "Yes", "Yes", "yes", "no.", "I think so", "no"])
    # existence: 3 of 4 questions, 1 of 2 images; OCR: an unread answer is wrong
    assert found.metrics == {"existence": 75 + 50, "OCR": 75 + 50, "accuracy": 6 / 8}
    assert found.counts == {"unread": 1}


def test_mme_sums_are_over_all_subtasks_or_left_out(tmp_path: Path) -> None:
    suite = Mme(made.mme(tmp_path, [*PERCEPTION, *COGNITION[1:]], images=1))
    metrics = suite.score(["yes", "no"] * 12 + ["yes", "yes"]).metrics
    assert metrics["perception"] == 2000
    assert "cognition" not in metrics  # commonsense_reasoning is not there
    made.mme(tmp_path, COGNITION[:1], images=1)
    metrics = Mme(tmp_path).score(["yes", "no"] * 13 + ["yes", "yes"]).metrics
    assert metrics["cognition"] == 3 * 200 + 50


def test_mme_refuses_what_is_no_pair(tmp_path: Path) -> None:
    made.mme(tmp_path)
    text = tmp_path / "OCR" / "1.txt"
    text.write_text("Only one?\tYes\n")
    with pytest.raises(DataError, match=r"1.txt: expected two questions about the image 1.png; got 1"):
        Mme(tmp_path)
    text.write_text("One?\tYes\nTwo?\tperhaps\n")
    with pytest.raises(DataError, match=r"1.txt, line 2: expected question, tab, Yes or No"):
        Mme(tmp_path)
    text.unlink()
    (tmp_path / "results").mkdir()
    assert Mme(tmp_path).counts["images_without_questions"] == 1 == Mme(tmp_path).counts["folders_not_used"]
    (tmp_path / "OCR" / "7.txt").write_text("One?\tYes\nTwo?\tNo\n")
    with pytest.raises(DataError, match="asks about an image 7, which is not in"):
        Mme(tmp_path)
    with pytest.raises(DataError, match="none of MME's subtasks"):
        Mme(tmp_path / "OCR")


OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "green and blue"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        *(("B", "B"), ("A", "A"), ("It is A", "A"), ("The answer is A", None), ("A bird, so answer C", "C")),
        *(("B or C", None), ("(C)", "C"), ("D.", "D"), ("The answer is (A).", "A"), ("A. red", "A")),
        *(("A: B, or C?", None), ("It is Red", "A"), ("The colour is blue", "C"), ("green and blue", None)),
        *(("", None), ("E", None), ("b", None)),
    ],
)  # fmt: skip
def test_options_are_read_in_three_steps(output: str, expected: str | None) -> None:
    assert read_option(output, OPTIONS) == expected


def test_mmbench_vanilla_and_circular(tmp_path: Path) -> None:
    suite = MMBench(made.mmbench(tmp_path / "dev.tsv"))
    assert suite.questions[0].prompt.splitlines()[:3] == ["Look.", "What is it?", "A. cat"]
    assert suite.counts == {"questions": 6, "in_all_rotations": 2, "without_all_rotations": 0}
    assert suite.questions[1].image.read() == suite.questions[0].image.read()  # pyright: ignore
    assert suite.questions[4].image.read() != suite.questions[0].image.read()  # pyright: ignore
    right = ["B", "(A)", "It is D", "dog", "A.", "yes"]
    metrics = suite.score(right).metrics
    assert metrics["vanilla"] == metrics["circular"] == metrics["circular_FP-S"] == metrics["circular_colours"] == 1
    found = suite.score([*right[:2], "C", *right[3:]])  # one wrong rotation
    assert (found.metrics["vanilla"], found.metrics["circular"]) == (1, 1 / 2)
    assert (found.metrics["circular_animals"], found.metrics["circular_CP"]) == (0, 1)
    found = suite.score(["cat", *right[1:5], "no idea"])  # the first as it was written; an unread rotation
    assert (found.metrics["vanilla"], found.metrics["circular"], found.counts["unread"]) == (1 / 2, 0, 0)
    assert suite.score([*right[:5], "?"]).counts == {"unread": 1}


def test_mmbench_without_rotations_or_answers(tmp_path: Path) -> None:
    plain = [row for row in made.ROWS if row[0] in (5, 6)]
    metrics = MMBench(made.mmbench(tmp_path / "plain" / "x.tsv", plain).parent).score(["B", "B"]).metrics
    assert metrics["vanilla"] == 1 / 2
    assert "circular" not in metrics
    part = MMBench(made.mmbench(tmp_path / "part.tsv", [*made.ROWS[:2], *made.ROWS[4:]]))
    assert (part.counts["in_all_rotations"], part.counts["without_all_rotations"]) == (1, 1)
    assert part.score(["A", "A", "A", "B"]).metrics["circular"] == 1  # over question 6 alone
    blind = MMBench(made.mmbench(tmp_path / "test.tsv", answers=False))
    assert blind.score(["B", "?", "C", "D", "A", "B"]).metrics == {"unread": 1 / 6}
    with pytest.raises(ConfigError, match=r"has no answers.*--output FOLDER"):
        blind.check_output(None)
    table = blind.table(["B", "?\n!", "C", "D", "A", "B"]).split("\n", 2)
    assert table[0] == "index\tquestion\tA\tB\tC\tD\tprediction"
    assert table[1] == "5\tWhat is it?\tcat\tdog\tcow\then\tB"
    assert table[2].startswith('1000005\tWhat is it?\tdog\tcow\then\tcat\t"?\n!"\n')


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (made.ROWS[1:], "the row 1000005 is a rotation of a question 5 that is not there"),
        ([*made.ROWS, made.ROWS[0]], "has the index 5 2 times"),
        ([(5, "Which?", "a", "b", "", "", "C", "x", "y", "")], "row 1: 'answer' must be one of A, B; got str \"C\""),
        ([(5, "Which?", "a", "", "c", "", "A", "x", "y", "")], "expected two options or more from A on; got A, C"),
        ([("1.5", "Which?", "a", "b", "", "", "A", "x", "y", "")], "'index' must be a whole number"),
    ],
)
def test_mmbench_refuses_what_it_cannot_score(rows: list[Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    if rows[0][0] == "1.5":
        made.mmbench(file, [(5, *rows[0][1:])])
        file.write_text(file.read_text().replace("\n5\t", "\n1.5\t"))
    else:
        made.mmbench(file, rows)
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        MMBench(file)


def test_pope_figures_by_kind_of_objects(tmp_path: Path) -> None:
    suite = Pope(made.pope(tmp_path))
    found = suite.score(["yes", "no", "no", "no", "yes", "no", "yes", "who knows"])
    assert {name: found.metrics[f"{name}_random"] for name in ("accuracy", "precision", "recall", "f1", "yes")} == {
        **{"accuracy": 3 / 4, "precision": 1, "recall": 1 / 2},
        **{"f1": 2 / 3, "yes": 1 / 4},
    }
    assert (found.metrics["accuracy_popular"], found.metrics["f1_popular"]) == (3 / 4, 1)  # unread is wrong, no "yes"
    assert found.metrics["accuracy"] == 6 / 8
    assert found.counts == {"unread": 1, "questions_random": 4, "questions_popular": 4}
    silent = suite.score([""] * 8).metrics
    assert (silent["precision"], silent["recall"], silent["f1"]) == (0, 0, 0)


def test_records_of_questions_about_images(tmp_path: Path) -> None:
    made.draw(tmp_path / "a.png")
    records = [
        {"image": "a.png", "question": "What?", "answers": ["Cat", "kitten"], "dataset": "one", "split": "val"},
        {"image": "a.png", "question": "How many?", "answer": 3, "dataset": "two"},
        {"image": "a.png", "question": "Who?", "answer": "she", "dataset": "two"},
    ]
    (tmp_path / "vqa.json").write_text(json.dumps(records))
    suite = Vqa(tmp_path / "vqa.json")
    found = suite.score(["a black  cat.", "Three.", "SHE"])
    assert found.metrics["contains"] == 2 / 3
    assert found.metrics["contains_mean_of_sets"] == (1 + 1 / 2) / 2 == 3 / 4
    assert suite.counts == {"questions": 3, "unused_field_split": 1}
    for change, message in (({"answer": [], "answers": []}, "'answer' or 'answers'"), ({"image": "b.png"}, "no image")):
        (tmp_path / "vqa.json").write_text(json.dumps([records[1] | change]))
        with pytest.raises(DataError, match=message):
            Vqa(tmp_path / "vqa.json")


@pytest.mark.parametrize("name", sorted(SUITES))
def test_a_suite_is_read_from_what_is_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no|none of"):
        SUITES.get(name)(tmp_path / "nothing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected one|none of|holds no"):
        SUITES.get(name)(tmp_path / "empty")
