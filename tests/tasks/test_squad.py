"""Extractive question answering: strict reading, windows, decoding, loss, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tasks.encoder import encoder_tokenizer, save_tiny_encoder, tiny_encoder
from zinit.config import PrefixConfig, TrainConfig
from zinit.engine import make_accelerator
from zinit.errors import BackboneError, ConfigError, DataError
from zinit.hosts import load_encoder
from zinit.metrics import METRICS
from zinit.run import evaluate_run, train_run
from zinit.settings import RunConfig, list_presets, read_preset
from zinit.tasks._questions import Question, parse_questions, read_questions
from zinit.tasks._windows import best_answer, best_span, make_windows
from zinit.tasks.squad import Squad, SquadConfig

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared is absent")
NAMES = ("Ada", "Björn", "Chen 陈", "Dora", "Émile", "Faye")


def document(count: int = 12, *, unanswerable: bool = True) -> dict[str, Any]:
    """Official JSON: one paragraph per number, each with one question or two."""
    paragraphs = []
    for i in range(count):
        name = NAMES[i % 6]
        context = (
            f"It rained{' a lot' * (i % 4)}. {name}  lives in house {i}. The street is quiet{' at night' * (i % 3)}."
        )
        answer = {"text": f"house {i}", "answer_start": context.index(f"house {i}")}
        qas = [{"id": f"q{i}", "question": f"Where does {name} live?", "answers": [answer], "is_impossible": False}]
        if unanswerable and i % 2:
            qas.append({"id": f"n{i}", "question": "Who is the king?", "answers": [], "is_impossible": True})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "v2.0", "data": [{"title": "Street", "paragraphs": paragraphs}]}


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def make(folder: Path, content: Any = None, kind: str = "roberta", tokenizer: Any = None, **settings: Any) -> Squad:
    config = SquadConfig(**{"max_length": 96, "stride": 16, "max_question": 32, **settings})
    data = write(folder / "data.json", document() if content is None else content)
    return Squad(tiny_encoder(kind), tokenizer or encoder_tokenizer(kind), None, config, data=data, seed=0)


# Reading


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
         r"2c8': the answer '10' does not stand at answer_start 0: 'Be' stands there. It occurs at 11. Correct it"),
        ("squad_answer-wrong.json", r"the answer '11' does not stand at answer_start 11: '10' stands there. It occurs "
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
        (broken(id=7), "paragraph 2 of 'Street': the field 'id' must be text; got int 7"),
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
    for task in (
        make(tmp_path, document(8), held_out_data=dev),
        Squad(tiny_encoder(), encoder_tokenizer(), None, SquadConfig(max_length=256), data=str(both), seed=0),
    ):
        counts = task.data_report()
        assert (counts["held_out"], counts["train"], counts["train_skipped_also_held_out"]) == (15, 0, 12)
    write(both / "dev-v1.1.json", document(3))
    with pytest.raises(DataError, match=r"several dev\* files: dev-v1.1.json, dev-v2.0.json"):
        make(tmp_path, held_out_data=str(both))
    only = Squad(tiny_encoder(), encoder_tokenizer(), None, SquadConfig(max_length=256, held_out_data=dev), data=None,
                 seed=0, train=False)  # fmt: skip
    assert (len(only.train_stream), only.data_report()["held_out"]) == (0, 15)


def test_the_data_decides_the_version(tmp_path: Path) -> None:
    assert make(tmp_path).unanswerable
    assert not make(tmp_path, document(unanswerable=False)).unanswerable
    assert make(tmp_path, document(unanswerable=False), version=2.0).unanswerable
    with pytest.raises(DataError, match=r"version is 1.1, but 6 questions have no answer, the first is 'n1'"):
        make(tmp_path, version="1.1")
    with pytest.raises(ConfigError, match=r"version must be one of 'auto', '1.1', '2.0'; got '3.0'"):
        SquadConfig(version=3.0)  # pyright: ignore[reportArgumentType]


# Windows


@pytest.mark.parametrize("kind", ["roberta", "bert", "untrimmed"])
def test_windows_against_a_naive_oracle(kind: str) -> None:
    """One token per byte, so which bytes are in which window can be said by arithmetic."""
    tokenizer = encoder_tokenizer("bert" if kind == "bert" else "roberta", trim=kind != "untrimmed")
    special = 3 if kind == "bert" else 4
    questions, _ = parse_questions(document(), "data")
    made = make_windows(tokenizer, questions, max_length=60, stride=16, max_question=20, types=kind == "bert")
    assert made.truncated_questions == sum(len(question.text.encode()) > 20 for question in questions) > 0
    assert made.unreachable == 0  # no answer is longer than the stride
    assert [window.question for window in made.items] == sorted(window.question for window in made.items)
    for index, question in enumerate(questions):
        windows = [window for window in made.items if window.question == index]
        asked = question.text.encode()[:20].decode(errors="ignore").rstrip()
        whole = question.context.encode()
        room = 60 - special - len(asked.encode())
        begins = list(range(0, max(1, len(whole) - 16), room - 16))
        assert len(windows) == len(begins)
        held = 0
        for begin, window in zip(begins, windows, strict=True):
            part = whole[begin : begin + room]
            assert len(window.ids) == special + len(asked.encode()) + len(part) <= 60
            shown = tokenizer.convert_ids_to_tokens(window.ids.tolist())
            assert shown[0] == "<s>"
            assert shown[-1] == "</s>"
            assert window.first == len(window.ids) - len(part) - 1
            assert window.ids[window.first : -1].tolist() == tokenizer(
                whole.decode(), add_special_tokens=False
            )["input_ids"][begin : begin + room]  # fmt: skip
            if question.answers:
                left = len(question.context[: question.starts[0]].encode())
                right = left + len(question.answers[0].encode())
                if begin <= left and right <= begin + room:
                    held += 1
                    assert (window.start, window.end) == (window.first + left - begin, window.first + right - begin - 1)
                    first, last = window.offsets[window.start - window.first], window.offsets[window.end - window.first]
                    assert question.context[first[0] : last[1]].strip() == question.answers[0]
                    continue
            assert (window.start, window.end) == (window.cls, window.cls) == (0, 0)
        assert bool(held) == bool(question.answers)
        if kind == "bert":
            assert windows[0].types is not None
            assert windows[0].types.tolist() == [0] * windows[0].first + [1] * (len(windows[0].ids) - windows[0].first)


def test_an_answer_that_no_window_holds_is_counted(tmp_path: Path) -> None:
    context = "x" * 30 + " " + "y" * 60 + " " + "z" * 30
    record = {"id": "1", "question": "What?", "context": context,
              "answers": [{"text": "y" * 60, "answer_start": 31}]}  # fmt: skip
    other = {"id": "2", "question": "What?", "context": "z", "answers": [{"text": "z", "answer_start": 0}]}
    counts = make(tmp_path, [record, other], max_length=64, max_question=8, stride=16).data_report()
    assert counts["train_truncated_answers"] + counts["held_out_truncated_answers"] == 1


@pytest.mark.parametrize("cut", [0, 1])
def test_text_that_looks_like_a_special_token_stays_text(cut: int, tmp_path: Path) -> None:
    context = "The tag <s> ends with </s> here."
    record = {"id": "1", "context": context, "question": "</s>?" + "e" * 40 * cut,
              "answers": [{"text": "</s>", "answer_start": context.index("</s>")}]}  # fmt: skip
    task = make(tmp_path, [record, {**record, "id": "2", "context": context + "!"}])
    for window in (*task.train_windows, *task.held_out_windows):
        assert sum(window.ids == 2) == 3
        assert sum(window.ids == 0) == 1


@needs_data
@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_gold_scores_decode_to_gold_answers(language: str) -> None:
    """RoBERTa's own tokens on real text: what is not decoded lies within a token ("Manning" in "Mannings")."""
    from transformers import RobertaTokenizerFast

    folder = DATA / "tokenizers" / "roberta"
    tokenizer = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    questions, skipped = read_questions(str(DATA / "squad" / f"xquad.{language}.json"))
    made = make_windows(tokenizer, questions, max_length=384, stride=128, max_question=64, types=False)
    assert skipped == made.unreachable == 0
    found = []
    for index, question in enumerate(questions):
        windows = [window for window in made.items if window.question == index]
        gold = [np.zeros((len(window.ids), 2)) for window in windows]
        for window, scores in zip(windows, gold, strict=True):
            scores[window.start, 0] = scores[window.end, 1] = 9.0
        found.append(best_answer(question.context, windows, gold, n_best=20, max_answer=384).text)
    references = [list(question.answers) for question in questions]
    result = METRICS.get("squad")().compute(predictions=found, references=references)
    assert result["exact_match"] == {"en": 100.0, "de": 100 * 807 / 808, "zh": 100.0}[language]
    missed = [pair for pair in zip(found, references, strict=True) if pair[1][0] not in pair[0]]
    assert not missed


# Decoding


def test_decoding_against_brute_force_over_random_scores() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        count, n_best, longest = int(draw.integers(1, 14)), int(draw.integers(1, 6)), int(draw.integers(1, 5))
        scores = draw.permutation(2 * count).reshape(count, 2).astype(np.float32)
        offsets = np.stack([np.arange(count), np.arange(count) + 1], axis=1)
        offsets[draw.random(count) < 0.2] = -1  # white space
        allowed = [i for i in range(count) if offsets[i, 0] >= 0]
        tried = [sorted(allowed, key=lambda i: -scores[i, side])[:n_best] for side in (0, 1)]
        found: list[tuple[float, int, int]] = []
        for firsts, lasts in (tried, (allowed, allowed)):
            spans = [(i, j) for i in firsts for j in lasts if i <= j < i + longest]
            found = found or [(float(scores[i, 0] + scores[j, 1]), i, j) for i, j in spans]
        span = best_span(scores, offsets, n_best, longest)
        if not found:
            assert span is None
        else:
            assert span is not None
            assert span[0] == max(found)[0]
            assert span in found


def test_the_null_score_is_the_smallest_of_the_windows_and_spans_compete_across_windows() -> None:
    context = "one two three four five six seven"
    question = Question(id="1", text="?", context=context, answers=(), starts=())
    made = make_windows(encoder_tokenizer(), [question], max_length=20, stride=3, max_question=4, types=False)
    assert len(made.items) > 2
    scores = [np.zeros((len(window.ids), 2)) for window in made.items]
    for index, score in enumerate(scores):
        score[0] = [3 - index, 1.0]
        score[1] = score[-1] = 50.0  # the question and the last special token are no answer
    last = made.items[-1]
    scores[-1][last.first, 0] = scores[-1][len(last.ids) - 2, 1] = 2.0
    span = best_answer(context, made.items, scores, n_best=20, max_answer=30)
    assert span.text == context[last.offsets[0, 0] :]
    assert span.score == 4.0
    assert span.null == 3 - (len(made.items) - 1) + 1.0
    assert span.null_odds == span.null - 4.0


@pytest.mark.parametrize("trim", [True, False])
def test_white_space_is_no_answer(trim: bool) -> None:
    context = "a  b   c"
    question = Question(id="1", text="?", context=context, answers=(), starts=())
    made = make_windows(encoder_tokenizer(trim=trim), [question], max_length=20, stride=3, max_question=4, types=False)
    window = made.items[0]
    scores = np.zeros((len(window.ids), 2))
    for place, character in enumerate(context):
        scores[window.first + place] = 9.0 if character == " " else ord(character) - ord("a")
    span = best_answer(context, made.items, [scores], n_best=20, max_answer=30)
    assert (span.text, span.score) == ("c", 4.0)


# The task


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_equals_that_of_a_loop_without_padding(kind: str, side: str, tmp_path: Path) -> None:
    tokenizer = encoder_tokenizer(kind, padding_side=side)
    task = make(tmp_path, kind=kind, tokenizer=tokenizer, max_length=80)
    indices = list(range(0, len(task.train_stream), 2))
    found = task(task.collate(task.train_stream, indices))
    expected = torch.zeros(())
    for index in indices:
        window = task.train_windows[index]
        inputs = {"input_ids": torch.tensor(window.ids[None].astype(np.int64))}
        if kind == "bert":
            assert window.types is not None
            inputs["token_type_ids"] = torch.tensor(window.types[None].astype(np.int64))
        scores = task.head(task.model(**inputs).last_hidden_state)[0]
        for side_of_answer, target in enumerate((window.start, window.end)):
            expected = expected + F.cross_entropy(scores[None, :, side_of_answer], torch.tensor([target])) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert task.train_stream.counts == [1] * len(task.train_stream)


def test_the_head_follows_from_the_seed_and_stays_float32(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    assert torch.equal(first.head.weight, second.head.weight)
    first.model.to(torch.bfloat16)
    batch = first.collate(first.train_stream, [0, 1])
    loss = first(batch)
    assert loss.dtype == first.head.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first._scores(batch).dtype == torch.float32


def test_one_batch_can_be_learned(tmp_path: Path) -> None:
    task = make(tmp_path, document(6), version="2.0")
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    batch = task.collate(task.train_stream, range(len(task.train_stream)))
    losses = []
    for _ in range(60):
        loss = task(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def answered_by_hand(task: Squad) -> dict[str, tuple[str, float]]:
    """Every question by itself, one window at a time, all spans tried."""
    found = {}
    for index, question in enumerate(task.held_out_questions):
        best, null = (-np.inf, ""), np.inf
        for window in (window for window in task.held_out_windows if window.question == index):
            ids = torch.tensor(window.ids[None].astype(np.int64))
            with torch.no_grad():
                scores = task.head(task.model(input_ids=ids).last_hidden_state)[0].numpy()
            null = min(null, scores[0].sum())
            for i in range(len(window.offsets)):
                for j in range(i, min(i + task.config.max_answer, len(window.offsets))):
                    left, right = window.offsets[i, 0], window.offsets[j, 1]
                    value = scores[window.first + i, 0] + scores[window.first + j, 1]
                    if left >= 0 and right >= 0 and value > best[0]:
                        best = (value, question.context[left:right])
        found[question.id] = (best[1].strip(), float(null - best[0]))
    return found


@pytest.mark.parametrize("unanswerable", [False, True])
def test_evaluation_against_one_window_at_a_time(unanswerable: bool, tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.json", document(8, unanswerable=unanswerable))
    task = make(tmp_path, document(30, unanswerable=unanswerable), held_out_data=dev, n_best=384)
    torch.nn.init.normal_(task.head.weight, std=0.3)
    expected = answered_by_hand(task)
    order = sorted(odds for _, odds in expected.values())
    threshold = (order[2] + order[3]) / 2  # a few questions are answered, the others are not
    task.config = replace(task.config, null_threshold=threshold)
    found = task.evaluate(make_accelerator(TrainConfig()))
    given = {key: "" if unanswerable and odds > threshold else text for key, (text, odds) in expected.items()}
    assert task.predictions == given
    assert list(task.null_odds.values()) == pytest.approx([odds for _, odds in expected.values()], abs=1e-4)
    assert found.counts["questions"] == len(given) == len(task.held_out_questions)
    assert found.counts["refused"] == sum(not text for text in given.values())
    assert found.counts["refused"] == (len(given) - 3 if unanswerable else 0)
    assert unanswerable == ("no_answer_f1" in found.metrics) == ("best_f1" in found.metrics)
    if unanswerable:
        assert found.metrics["best_exact_match"] >= found.metrics["exact_match"]
    else:
        assert all(given.values())
    everything = range(len(given))
    shared_out = task._answer(everything[::2]) + task._answer(everything[1::2])
    assert sorted((i, text) for i, text, _ in shared_out) == sorted(
        (i, text) for i, text, _ in task._answer(everything)
    )
    assert task.artifacts() == {"predictions.json": task.predictions, "null_odds.json": task.null_odds}
    assert task.evaluate(make_accelerator(TrainConfig()), limit=3).counts["questions"] == 3
    assert task.evaluate(make_accelerator(TrainConfig()), limit=0).metrics == {}
    for before, after in pairwise(found.samples):
        assert set(before) == set(after) == {"prompt", "expected", "output"}


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 400, but the model has room for 300 tokens"):
        make(tmp_path, max_length=400)
    with pytest.raises(ConfigError, match=r"hold 16 tokens of the context .* more than task.stride=16"):
        make(tmp_path, max_length=52)
    with pytest.raises(ConfigError, match="n_best must be a whole number of at least 1; got 0"):
        SquadConfig(n_best=0)
    with pytest.raises(ConfigError, match="null_threshold must be a number; got 'x'"):
        SquadConfig(null_threshold="x")  # pyright: ignore[reportArgumentType]
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="has no padding token"):
        make(tmp_path, tokenizer=tokenizer)


def test_loading_an_encoder(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "model", "bert")
    model, tokenizer = load_encoder(folder, dtype=torch.bfloat16)
    assert tokenizer.is_fast
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any("pooler" in name for name, _ in model.named_parameters())
    with pytest.raises(BackboneError, match="there is no model folder"):
        load_encoder(tmp_path / "nowhere", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BackboneError, match=r"lacks 16 weights of BertModel, such as encoder.layer.2"):
        load_encoder(folder, dtype=torch.float32)


def run_config(folder: Path, kind: str = "roberta", method: str = "zero-init") -> RunConfig:
    return RunConfig(
        backbone="roberta",
        task="squad",
        model=str(save_tiny_encoder(folder / "model", kind)),
        data=write(folder / "data.json", document(20)),
        method=method,
        prefix=PrefixConfig(length=4, parametrization="key_value"),
        train=TrainConfig(steps=8, batch_size=8, micro_batch_size=4, learning_rate=3e-2),
        options=SquadConfig(max_length=160, stride=16),
    )


def test_a_whole_run(tmp_path: Path) -> None:
    results = train_run(run_config(tmp_path), tmp_path / "run")
    frozen, adapted = results["metrics"]["frozen"], results["metrics"]["adapted"]
    assert adapted["loss"] < frozen["loss"]
    assert results["num_trainable"] == 2 * 4 * 32 * 2 + 2 * 4 + 66  # keys and values, gates, head
    assert results["counts"]["read"] == 30 == results["counts"]["train"] + results["counts"]["held_out"]
    assert {"exact_match", "f1", "has_answer_f1", "no_answer_f1", "best_f1", "best_f1_threshold"} <= set(adapted)
    assert set(results["samples"][0]) == {"prompt", "expected", "frozen", "adapted"}
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    odds = json.loads((tmp_path / "run" / "null_odds.json").read_text())
    assert len(predictions) == results["counts"]["held_out"]
    assert predictions.keys() == odds.keys()
    assert evaluate_run(tmp_path / "run")["metrics"] == results["metrics"]
    other = evaluate_run(tmp_path / "run", data=write(tmp_path / "other.json", document(5, unanswerable=False)))
    assert other["counts"]["questions"] == 5
    assert "no_answer_f1" not in other["metrics"]["adapted"]


@pytest.mark.parametrize(
    ("method", "kind"),
    [("prefix-tuning", "roberta"), ("prompt-tuning", "roberta"), ("full", "bert"), ("head-only", "roberta"),
     ("bitfit", "bert"), ("lora", "bert")],
)  # fmt: skip
def test_every_method_can_be_compared_with(method: str, kind: str, tmp_path: Path) -> None:
    results = train_run(run_config(tmp_path, kind, method), tmp_path / "run")
    assert results["metrics"]["adapted"]["loss"] < results["metrics"]["frozen"]["loss"]
    assert evaluate_run(tmp_path / "run")["metrics"] == results["metrics"]


PUBLISHED = [name for name in list_presets() if name.startswith(("squad/", "ner/")) and not name.endswith("/demo")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_recipes(name: str) -> None:
    """K, epochs, batch and rate of P-tuning v2."""
    values = read_preset(name)
    assert values.pop("description")
    config = RunConfig.from_dict(values)
    recipe = (config.prefix.length, config.train.epochs, config.train.batch_size, config.train.learning_rate)
    if name.startswith("squad/"):
        assert recipe == ((16, 30, 8, 5e-3) if name.endswith("v1.1") else (8, 10, 8, 5e-3))
        assert config.options.version == name[-3:]
        assert config.prefix.gating == ("p-tuning" not in name)
    else:
        assert recipe == {"3": (11, 30, 16, 3e-2), "4": (144, 80, 32, 6e-2)}[name[-1]]
        assert config.options.max_length == {"3": 152, "4": 128}[name[-1]]
