"""Extractive question answering: strict reading, and the two parts."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.shared import needs_data
from tests.tasks.encoder import encoder_tokenizer, tiny_encoder
from tests.tasks.squad import DATA, document, make, write
from zinit.errors import ConfigError, DataError
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate, write_artifacts
from zinit.tasks.base import TaskInputs
from zinit.tasks.squad.questions import parse_questions, read_questions
from zinit.tasks.squad.task import Squad, SquadConfig
from zinit.train.strategy import make_accelerator


@needs_data
@pytest.mark.parametrize(
    ("file", "count", "unanswerable"),
    [
        ("squad/xquad.en.json", 808, 0),
        ("squad/xquad.de.json", 808, 0),
        ("squad/xquad.zh.json", 808, 0),
        ("squad/dev-v2.0_normans_complexity.json", 626, 333),
        ("squad/flat_sample.json", 14, 6),
        ("squad/allennlp_fixture_squad.json", 5, 0),
        ("messy/squad_vanilla.json", 1, 0),
        ("messy/squad_noanswer.json", 1, 1),
    ],
)
def test_real_files_are_read_whole(file: str, count: int, unanswerable: int) -> None:
    questions, skipped = read_questions(str(DATA / file))
    assert (len(questions), skipped) == (count, 0)
    assert sum(not question.answers for question in questions) == unanswerable
    for question in questions:
        for answer, start in zip(question.answers, question.starts, strict=True):
            assert question.context[start : start + len(answer)] == answer


@needs_data
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("squad_answer-offset-wrong.json", r"offset-wrong.json, paragraph 1 of 'Test', question '5ad3d560604f3c001a3ff"
         r"2c8': the answer '10' is not at answer_start 0: 'Be' is there. It occurs at 11. Correct it"),
        ("squad_answer-wrong.json", r"the answer '11' is not at answer_start 11: '10' is there. It occurs "
         r"nowhere in the context. Correct it, or leave such questions out: -o task.on_bad=skip"),
        ("lfs_pointer_dev-v2.0.json", "is a Git LFS pointer, not the data itself"),
    ],
)  # fmt: skip
def test_real_bad_files_are_refused(file: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(str(DATA / "messy" / file))


def broken(**change: Any) -> dict[str, Any]:
    whole = document(2, unanswerable=False)
    whole["data"][0]["paragraphs"][1]["qas"][0] |= change
    return whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(answers=[{"text": "house 1", "answer_start": 999}]),
         r"answer_start 999: the context has \d+ characters\. It occurs at \d+\."),
        (broken(answers=[{"text": ".", "answer_start": -1}]), "answer_start -1: the context has"),
        (broken(answers=[{"text": "", "answer_start": 0}]), "has an answer without text"),
        (broken(answers=[{"text": 1, "answer_start": 0}]), "'text' must be text; got int 1"),
        (broken(answers=[{"text": "a", "answer_start": "0"}]), "'answer_start' must be a whole number; got str"),
        (broken(answers=["house 1"]), "an answer must be an object with text and answer_start; got str"),
        (broken(answers={"text": ["a"], "answer_start": []}), "1 answer texts, but 0 of answer_start"),
        (broken(answers=None), "expected a list of answers"),
        (broken(is_impossible=True), "marked as impossible, but has the answer 'house 1'"),
        (broken(is_impossible="no"), "'is_impossible' must be true or false; got str"),
        (broken(id="q0"), "question 'q0': its id is not unique, paragraph 1 of 'Street' has it too"),
        (broken(id=[7]), "paragraph 2 of 'Street': the field 'id' must be text; got list"),
        (broken(question=None), "question 'q1': the field 'question' must be text"),
        (broken(question="\ud800"), "half of a surrogate pair"),
        ({"data": [{"title": "T", "paragraphs": [{"context": " ", "qas": []}]}]}, "the context is empty"),
        ({"data": [{"title": "T", "paragraphs": [{"qas": []}]}]}, "1 of 'T' has no field 'context'; it has qas"),
        ({"data": [{"title": "T", "paragraphs": {}}]}, "'paragraphs' must be a list; got dict"),
        ({"data": [{"title": "T", "paragraphs": [3]}]}, "paragraph 1 of 'T': expected an object; got int 3"),
        ({"data": [{"title": "T"}]}, "record 1: expected either an article with 'paragraphs'"),
        ({"data": []}, "holds no questions"),
        ({"version": "v2.0"}, "has no field 'data'; it has version"),
        ("3", "expected SQuAD's JSON, an object with the list 'data'; got int 3"),
        ("[3]", "entry 1: expected an object; got int 3"),
        ('{"data": [', "not valid JSON"),
    ],
)  # fmt: skip
def test_bad_input_is_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path / "bad.json", content))


def test_bad_questions_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    content = document()
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs[3]["qas"][0]["answers"][0]["answer_start"] += 1
    paragraphs[4]["qas"][0]["id"] = "q0"
    with pytest.raises(DataError, match=r"task\.on_bad=skip"):
        make(tmp_path, content)
    counts = make(tmp_path, content, on_bad="skip").data_report()
    assert counts["skipped_bad"] == 2
    assert counts["read"] == 18 == counts["train"] + counts["held_out"] + 2


def test_flat_records_give_the_same_questions_as_the_official_format(tmp_path: Path) -> None:
    from datasets import Dataset

    official, _ = parse_questions(document(), "official")
    rows = [
        {"id": q.id, "title": "Street", "context": q.context, "question": q.text,
         "answers": {"text": list(q.answers), "answer_start": list(q.starts)}}
        for q in official
    ]  # fmt: skip
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "rows.json", rows)
    for name in ("rows.parquet", "rows.jsonl", "rows.json"):
        assert read_questions(str(tmp_path / name)) == (official, 0)


def test_no_context_is_in_both_parts(tmp_path: Path) -> None:
    task = make(tmp_path)
    held_out = {question.context for question in task.held_out_questions}
    assert held_out
    assert not held_out & {question.context for question in task.train_questions}
    counts = task.data_report()
    assert counts["read"] == 18 == counts["train"] + counts["held_out"]
    with pytest.raises(DataError, match="about one context only"):
        make(tmp_path, document(1))


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    write(both / "train-v2.0.json", document(8))
    dev = write(both / "dev-v2.0.json", document(10))
    models: dict[str, Any] = {"model": tiny_encoder(), "processor": encoder_tokenizer()}
    for task in (
        make(tmp_path, document(8), held_out_data=dev),
        Squad(TaskInputs(**models, data=str(both)), SquadConfig(max_length=256)),
    ):
        counts = task.data_report()
        assert (counts["held_out"], counts["train"], counts["train_skipped_also_held_out"]) == (15, 0, 12)
    write(both / "dev-v1.1.json", document(3))
    with pytest.raises(DataError, match=r"several dev\* files: dev-v1.1.json, dev-v2.0.json"):
        make(tmp_path, held_out_data=str(both))
    only = Squad(TaskInputs(**models, train=False), SquadConfig(max_length=256, held_out_data=dev))
    assert (len(only.train_stream), only.data_report()["held_out"]) == (0, 15)


def test_the_data_decides_the_version(tmp_path: Path) -> None:
    assert make(tmp_path).unanswerable
    assert not make(tmp_path, document(unanswerable=False)).unanswerable
    assert make(tmp_path, document(unanswerable=False), version=2.0).unanswerable
    with pytest.raises(DataError, match=r"version is 1.1, but 6 questions have no answer, the first is 'n1'"):
        make(tmp_path, version="1.1")
    with pytest.raises(ConfigError, match=r"version must be one of 'auto', '1.1', '2.0'; got 3\.0"):
        SquadConfig(version=3.0)  # pyright: ignore[reportArgumentType]


BLANKS = ("", " ", "\n\t ", "\u00a0\u3000")


def with_questions(*texts: str) -> dict[str, Any]:
    whole = document(12, unanswerable=False)
    for place, text in enumerate(texts):
        paragraph = whole["data"][0]["paragraphs"][place]
        extra = {"id": f"x{place}", "question": text, "answers": paragraph["qas"][0]["answers"]}
        paragraph["qas"].append(extra)
    return whole


def test_white_space_around_a_question_is_no_content(tmp_path: Path) -> None:
    """A question behind 70 blanks was cut to nothing."""
    plain = make(tmp_path, with_questions("Where is it?"))
    blanks = make(tmp_path, with_questions(" " * 70 + "Where is it?\n" + "\t" * 70))
    assert blanks.fingerprint() == plain.fingerprint()
    assert blanks.data_report() == plain.data_report()


@pytest.mark.parametrize("at_once", [3, 256])
def test_questions_without_content_are_skipped_and_counted(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinit.tasks.squad.windows.AT_ONCE", at_once)
    task = make(tmp_path, with_questions(*BLANKS))
    counts = task.data_report()
    assert sum(counts.get(f"{p}_skipped_blank_question", 0) for p in ("train", "held_out")) == len(BLANKS)
    assert counts["read"] == counts["train"] + counts["held_out"] + len(BLANKS) == 16
    kept = [*task.train_questions, *task.held_out_questions]
    assert len(kept) == 12
    assert all(question.text for question in kept)
    for part in ("train", "held_out"):
        questions, windows = getattr(task, f"{part}_questions"), getattr(task, f"{part}_windows")
        assert {window.question for window in windows} == set(range(len(questions)))
        for window in windows:  # each is of the question that it says
            asked = task.tokenizer(questions[window.question].text, add_special_tokens=False)["input_ids"]
            assert window.ids[1 : 1 + len(asked)].tolist() == asked
    only = document(2, unanswerable=False)
    for paragraph in only["data"][0]["paragraphs"]:
        paragraph["qas"][0]["question"] = " "
    with pytest.raises(DataError, match="questions of the train part are blank"):
        make(tmp_path, only)


def blind(whole: dict[str, Any]) -> dict[str, Any]:
    for paragraph in whole["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            del question["answers"], question["is_impossible"]
    return whole


def test_a_blind_test_set_is_answered_and_not_measured(tmp_path: Path) -> None:
    data = write(tmp_path / "blind.json", blind(document(4)))
    inputs = {"model": tiny_encoder(), "processor": encoder_tokenizer()}
    config = SquadConfig(max_length=96, stride=16, max_question=32, held_out_data=data)
    task = Squad(TaskInputs(**inputs, train=False), config)
    assert len(task.held_out_stream) == 0  # there is no loss either
    config_of_run = RunConfig(backbone="roberta", task="squad")
    found = evaluate(task, config_of_run, make_accelerator(config_of_run.train))
    assert found.metrics == {}
    assert found.counts["questions"] == 6
    assert set(task.predictions) == {"q0", "q1", "n1", "q2", "q3", "n3"}
    assert all(task.predictions.values())
    write_artifacts(task, tmp_path / "answers")
    assert json.loads((tmp_path / "answers" / "predictions.json").read_text()) == task.predictions
    with pytest.raises(DataError, match="there is no field 'answers'"):  # nor is it trained or selected on
        Squad(TaskInputs(**inputs), config)
    half = document(4)
    half["data"][0]["paragraphs"][0] = blind(document(1))["data"][0]["paragraphs"][0]
    write(tmp_path / "blind.json", half)
    with pytest.raises(DataError, match=r"'q1' has answers, but those before it have none\. Give all"):
        Squad(TaskInputs(**inputs, train=False), config)


def test_whole_numbers_are_plain_whatever_their_type(tmp_path: Path) -> None:
    content = broken(id=7)
    answer = content["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]
    start, answer["answer_start"] = answer["answer_start"], float(answer["answer_start"])
    question = read_questions(write(tmp_path / "a.json", content))[0][1]
    assert (question.id, question.starts) == ("7", (start,))
    for wrong in (0.5, True, None, float("inf")):
        answer["answer_start"] = wrong
        with pytest.raises(DataError, match="'answer_start' must be a whole number"):
            read_questions(write(tmp_path / "a.json", content))


def test_tables_hold_answers_as_json(tmp_path: Path) -> None:
    official, _ = parse_questions(document(), "official")
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "context", "question", "answers", "is_impossible"])
        for q in official:
            answers = [{"text": t, "answer_start": s} for t, s in zip(q.answers, q.starts, strict=True)]
            table.writerow([q.id, q.context, q.text, json.dumps(answers) if answers else "", str(not answers)])
    assert read_questions(str(tmp_path / "rows.csv")) == (official, 0)
    write(tmp_path / "bad.csv", "id,context,question,answers\n1,a b,c?,[a\n")
    with pytest.raises(DataError, match=r"expected a list of answers; got str .*, which is no JSON"):
        read_questions(str(tmp_path / "bad.csv"))


def test_several_sources_have_ids_of_their_own(tmp_path: Path) -> None:
    first, second = document(6), document(6)
    models: dict[str, Any] = {"model": tiny_encoder(), "processor": encoder_tokenizer()}
    files = (write(tmp_path / "a.json", first), write(tmp_path / "b.json", second))
    with pytest.raises(DataError, match=r"b\.json, .*question 'q0': its id is not unique, .*a\.json, paragraph 1"):
        Squad(TaskInputs(**models, data=files), SquadConfig(max_length=256))
    for paragraph in second["data"][0]["paragraphs"]:
        paragraph["context"] += " Again."
        for question in paragraph["qas"]:
            question["id"] += "b"
    files = (files[0], write(tmp_path / "b.json", second))
    counts = Squad(TaskInputs(**models, data=files), SquadConfig(max_length=256)).data_report()
    assert (counts["read"], counts["read_source_1"], counts["read_source_2"]) == (18, 9, 9)
    assert counts["train"] + counts["held_out"] == 18


# What the files of ../shared show, on documents of our own: a clone has them.


def test_every_form_of_the_format_is_read_whole(tmp_path: Path) -> None:
    flat = [
        {"id": "a", "question": "Where?", "context": "Ada lives in Oslo.",
         "answers": {"text": ["Oslo", "in Oslo"], "answer_start": [13, 10]}},
        {"id": "b", "question": "Who?", "context": "Ada lives in Oslo.", "is_impossible": True,
         "answers": {"text": [], "answer_start": []}},
        {"id": "c", "question": "Who?", "context": "Ada lives in Oslo.", "is_impossible": True},
    ]  # fmt: skip
    official = document(3)
    del official["version"]
    for content, count, unanswerable in (
        ({"version": 2.0, "data": flat}, 3, 2),
        (flat, 3, 2),
        (official, 4, 1),
        (document(3, unanswerable=False), 3, 0),
    ):
        questions, skipped = read_questions(write(tmp_path / "data.json", content))
        assert (len(questions), skipped) == (count, 0)
        assert sum(not question.answers for question in questions) == unanswerable
        for question in questions:
            assert len(question.answers) == len(question.starts)
            for answer, start in zip(question.answers, question.starts, strict=True):
                assert question.context[start : start + len(answer)] == answer
    assert read_questions(write(tmp_path / "data.json", flat))[0][0].answers == ("Oslo", "in Oslo")


@pytest.mark.parametrize(
    ("text", "start", "message"),
    [
        ("10", 0, r"the answer '10' is not at answer_start 0: 'Be' is there. It occurs at 11. Correct it"),
        ("11", 11, r"the answer '11' is not at answer_start 11: '10' is there. It occurs nowhere in the context. "
                   r"Correct it, or leave such questions out: -o task.on_bad=skip"),
        ("10 inhabitants!", 11, r".* is not at answer_start 11: '10 inhabitants\.' is there"),
    ],
)  # fmt: skip
def test_answers_that_are_not_where_the_data_says(tmp_path: Path, text: str, start: int, message: str) -> None:
    asked = {"id": "5ad3", "question": "How many?", "answers": [{"text": text, "answer_start": start}]}
    content = {"data": [{"title": "Test", "paragraphs": [{"context": "Berlin has 10 inhabitants.", "qas": [asked]}]}]}
    with pytest.raises(DataError, match=rf"bad\.json, paragraph 1 of 'Test', question '5ad3': {message}"):
        read_questions(write(tmp_path / "bad.json", content))
    with pytest.raises(DataError, match="holds no questions; 1 were left out as bad"):
        read_questions(write(tmp_path / "bad.json", content), skip_bad=True)


def test_fields_that_are_not_read_are_counted_at_every_level(tmp_path: Path) -> None:
    official: dict[str, Any] = document(4) | {"license": "CC BY-SA 4.0", "note": " "}
    paragraph = official["data"][0]["paragraphs"][1]
    official["data"][0]["author"], paragraph["source"] = "Ada", "a book"
    paragraph["qas"][0]["answers"] = [answer | {"rank": 1} for answer in paragraph["qas"][0]["answers"] * 2]
    paragraph["qas"][1]["plausible_answers"] = [{"text": "Ada", "answer_start": 3}]
    paragraph["qas"][0]["plausible_answers"] = []
    names = ("license", "author", "paragraphs.source", "answers.rank", "qas.plausible_answers")
    unused: Counter[str] = Counter()
    read_questions(write(tmp_path / "a.json", official), unused=unused)
    assert unused == dict.fromkeys((f"unused_field_{name}" for name in names), 1)
    flat = [
        {"id": i, "context": f"House {i}.", "question": "Which?", "title": "Street",
         "answers": {"text": ["House"], "answer_start": [0], "rank": [1]}, "hint": "x" * (i % 2)}
        for i in range(6)
    ]  # fmt: skip
    counts = make(tmp_path, flat).data_report()
    assert [counts[f"unused_field_{name}"] for name in ("title", "answers.rank", "hint")] == [6, 6, 3]
    assert sum(name.startswith("unused_field") for name in counts) == 3
    assert not any("unused" in name for name in make(tmp_path, [{**row, "title": "", "hint": None, "answers":
        {"text": ["House"], "answer_start": [0]}} for row in flat]).data_report())  # fmt: skip
