"""Extractive question answering: windows and decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.shared import needs_data
from tests.tasks.encoder import encoder_tokenizer
from tests.tasks.squad import DATA, document, make
from zinit.metrics import METRICS
from zinit.tasks.squad.questions import Question, parse_questions, read_questions
from zinit.tasks.squad.windows import best_answer, best_span, make_windows

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


CONTEXTS = (  # answers in brackets: several in a context, in several scripts, beside punctuation and inside of words
    "Die [Straße] nach «[Köln]» ist [17,5 km] lang (und [nachts] gesperrt).",
    "[上海]位于中国东部、人口约[2487万]。市花是[白玉兰]。",
    "[Émile Zola] wrote “[Germinal]” in [1885]. It is [Zola]'s thirteenth of [twenty] novels.",
)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("marked", CONTEXTS)
def test_gold_scores_of_own_texts_decode_to_gold_answers(marked: str, trim: bool) -> None:
    """As `test_gold_scores_decode_to_gold_answers` does with data that a clone lacks; windows hold a part each."""
    context = marked.replace("[", "").replace("]", "")
    questions = []
    for number, piece in enumerate(marked.split("[")[1:]):
        before = "[".join(marked.split("[")[: number + 1])
        start = len(before.replace("[", "").replace("]", ""))
        answer = piece.partition("]")[0]
        assert context[start : start + len(answer)] == answer
        questions.append(Question(id=str(number), text="What?", context=context, answers=(answer,), starts=(start,)))
    made = make_windows(encoder_tokenizer(trim=trim), questions, max_length=60, stride=24, max_question=8, types=False)
    assert made.unreachable == 0
    for index, question in enumerate(questions):
        windows = [window for window in made.items if window.question == index]
        assert len(windows) > 1
        gold = [np.zeros((len(window.ids), 2)) for window in windows]
        for window, scores in zip(windows, gold, strict=True):
            scores[window.start, 0] = scores[window.end, 1] = 9.0
        span = best_answer(context, windows, gold, n_best=20, max_answer=60)
        assert (span.text, span.score) == (question.answers[0], 18.0)
