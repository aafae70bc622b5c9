"""The text metrics: known answers, and what evaluate does behind them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from zinit.errors import ConfigError, DataError
from zinit.metrics import METRICS
from zinit.metrics.final_answer import final_answer
from zinit.metrics.squad import best_threshold, exact_match, f1, normalize_answer
from zinit.tasks import TASKS

SQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad"
TEXT_METRICS = ("exact_match", "rouge_l")  # one reference each
PAIRS = [
    ("Paris", "Paris"),
    (" Paris\n", "Paris"),
    ("paris", "Paris"),
    ("", ""),
    ("The lazy dogs were jumping.", "A dog was jumping over the lazy fox!"),
]


def compute(name: str, pairs: list[tuple[str, str]], **options: Any) -> float:
    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    result = METRICS.get(name)().compute(predictions=predictions, references=references, **options)
    assert list(result) == [name]
    return result[name]


def test_exact_match_known_answers() -> None:
    assert compute("exact_match", PAIRS) == 3 / 5
    assert compute("exact_match", PAIRS, ignore_case=True) == 4 / 5
    assert compute("exact_match", [("STRASSE", "Straße")], ignore_case=True) == 1.0
    assert compute("exact_match", [("a  b", "a b")]) == 0.0  # white space inside counts


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("the cat sat", "the cat sat down", 2 * 3 / (3 + 4)),
        ("c b a", "a b c", 1 / 3),  # any order-keeping subsequence has one token
        ("a x b y c", "a b c", 2 * 3 / (5 + 3)),
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin's example, with beta = 1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("A, B!", "a b", 1.0),
        ("nothing", "in common", 0.0),
        ("", "a", 0.0),
    ],
)
def test_rouge_l_known_answers(prediction: str, reference: str, expected: float) -> None:
    assert compute("rouge_l", [(prediction, reference)]) == pytest.approx(expected)


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_l_is_the_mean_of_rouge_score(use_stemmer: bool) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    expected = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in PAIRS]
    assert compute("rouge_l", PAIRS, use_stemmer=use_stemmer) == pytest.approx(sum(expected) / len(expected))


def test_rouge_l_stems_only_when_asked() -> None:
    pair = [("police killing gunman", "police killed gunman")]
    assert compute("rouge_l", pair) == pytest.approx(2 / 3)
    assert compute("rouge_l", pair, use_stemmer=True) == 1.0


def test_rouge_l_of_other_scripts() -> None:
    russian, chinese = [("кошка спит дома", "кошка спит")], [("猫睡觉", "猫在睡觉")]
    assert compute("rouge_l", russian) == compute("rouge_l", chinese) == 0.0
    assert compute("rouge_l", russian, tokens="whitespace") == pytest.approx(2 * 2 / (3 + 2))
    assert compute("rouge_l", chinese, tokens="characters") == pytest.approx(2 * 3 / (3 + 4))


@pytest.mark.parametrize("options", [{"tokens": "words"}, {"tokens": "characters", "use_stemmer": True}])
def test_rouge_l_refuses_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        compute("rouge_l", PAIRS, **options)


@pytest.mark.parametrize("name", TEXT_METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to compare"),
        (None, None, "nothing to compare"),
        (["a"], None, "belong together"),
        (["a"], ["a", "b"], "Mismatch"),
        ([1], ["a"], "format"),
        (["a", None], ["a", "b"], "pair 1 holds null"),
    ],
)
def test_bad_pairs_are_refused_and_leave_nothing_behind(
    name: str, predictions: Any, references: Any, message: str
) -> None:
    metric = METRICS.get(name)()
    with pytest.raises(DataError, match=message):
        metric.compute(predictions=predictions, references=references)
    assert metric.compute(predictions=["a"], references=["a"]) == {name: 1.0}


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_bad_batch_takes_what_was_added_before_with_it(name: str) -> None:
    metric = METRICS.get(name)()
    metric.add(prediction="b", reference="c")
    with pytest.raises(DataError, match="Mismatch"):
        metric.compute(predictions=["a"], references=[])
    assert metric.compute(predictions=["a"], references=["a"]) == {name: 1.0}


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_pairs_may_be_added_bit_by_bit(name: str) -> None:
    metric = METRICS.get(name)()
    metric.add(prediction="a", reference="a")
    metric.add_batch(predictions=["b"], references=["c"])
    assert metric.compute() == {name: 0.5}


@pytest.mark.integration
def test_metrics_touch_no_disk_and_listing_them_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from zinit.metrics import METRICS; names = list(METRICS)\n"
        "assert 'evaluate' not in sys.modules and 'rouge_score' not in sys.modules\n"
        "made = [METRICS.get(name)() for name in names if name != 'meteor']\n"  # imports all that two processes share
        "child = os.fork()\n"
        "several = ('squad', 'squad_v2', 'bleu', 'caption_rouge_l', 'cider_d', 'contains')\n"
        "for name in set(names) - {'meteor'}:\n"  # which runs another program
        "    metric = METRICS.get(name)()\n"
        "    for text in 'abcd', 'wxyz':\n"
        "        text = ' '.join(text) + (' #### 5' if name == 'final_answer' else '')\n"
        "        metric.add(prediction=text, reference=[text] if name in several else text)\n"
        "    assert os.listdir() == []\n"
        "    best = {'squad': 100.0, 'squad_v2': 100.0, 'cider_d': 10.0}.get(name, 1.0)\n"
        "    assert abs(next(iter(metric.compute().values())) - best) < 1e-9, name\n"
        "assert not child or os.waitpid(child, 0)[1] == 0\n"
    )
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_METRICS_CACHE": str(tmp_path / "metrics")}
    environment = {**os.environ, **home, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    here = tmp_path / "here"
    here.mkdir()
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=here).returncode == 0
    assert not (tmp_path / "metrics").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".lock")]


# Figures of the official scripts on these files, as ../shared/data/SOURCES.md states them: to the last digit.
OFFICIAL = {
    "bert_ensemble_v1.1": ("squad", "xquad.en", (75.61881188118812, 86.63640386063405)),
    "logreg_baseline_v1.1": ("squad", "xquad.en", (32.92079207920792, 44.30357371520039)),
    "bert_single_v2.0": (
        "squad_v2",
        "dev-v2.0_normans_complexity",
        (76.8370607028754, 79.76284553235601, 64.50511945392492, 70.75611366298587, *[87.68768768768768] * 2),
    ),
    "nlnet_single_v2.0": (
        "squad_v2",
        "dev-v2.0_normans_complexity",
        (76.6773162939297, 78.53795831431614, 69.96587030716724, 73.94116691045019, *[82.58258258258259] * 2),
    ),
}


@pytest.mark.skipif(not SQUAD.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("predictions", OFFICIAL)
def test_squad_gives_the_official_figures_to_the_last_digit(predictions: str) -> None:
    name, data, expected = OFFICIAL[predictions]
    answers = json.loads((SQUAD / "predictions" / f"{predictions}.json").read_text())
    articles = json.loads((SQUAD / f"{data}.json").read_text())["data"]
    questions = [qa for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    result = METRICS.get(name)().compute(
        predictions=[answers[qa["id"]] for qa in questions],
        references=[[answer["text"] for answer in qa["answers"]] for qa in questions],
    )
    assert tuple(result.values()) == expected
    assert list(result)[:2] == ["exact_match", "f1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tand a dog!", "cat and dog"),
        ("an-other", "another"),  # punctuation goes before articles: no article is left here
        ("a.b the.c", "ab thec"),
        ("U.S.A.", "usa"),
        ("theory of an anthem", "theory of anthem"),
        ("\u201cDie Straße\u201d", "\u201cdie straße\u201d"),  # only ASCII punctuation
        ("Ångström\u00a0x", "ångström x"),  # any white space
        ("the", ""),
        ("!?", ""),
    ],
)
def test_answers_are_normalised_as_in_squad(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_squad_known_answers() -> None:
    assert exact_match("the Eiffel Tower!", "eiffel tower") == 1.0
    assert f1("big red cat", "red cat sat") == pytest.approx(2 / 3)
    assert f1("to be or to be", "to to to") == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))  # as a multiset
    assert f1("the", "!") == 0.0
    assert f1("the", "!", empty_matches=True) == 1.0
    assert f1("x", "!", empty_matches=True) == 0.0
    metric = METRICS.get("squad")()
    assert metric.compute(predictions=["Rhine", "x y"], references=[["Elbe", "the Rhine"], ["x", "x z"]]) == {
        "exact_match": 50.0,
        "f1": 100 * (1 + 2 / 3) / 2,  # 2/3 against "x", 1/2 against "x z"
    }


def test_squad_v2_counts_unanswerable_questions_apart() -> None:
    metric = METRICS.get("squad_v2")()
    result = metric.compute(predictions=["a b", "", "", "x"], references=[["b c"], ["d"], [], []])
    assert result == {
        "exact_match": 25.0,
        "f1": pytest.approx(100 * (2 / 3 + 1) / 4),  # "a" is an article
        "has_answer_exact_match": 0.0,
        "has_answer_f1": pytest.approx(100 / 3),
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
    }
    only = metric.compute(predictions=["x"], references=[["x"]])
    assert "no_answer_f1" not in only
    assert metric.compute(predictions=[""], references=[["the"]])["exact_match"] == 100.0  # a reference without words


def test_the_best_threshold_is_that_of_a_search_over_all() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 8)
        scores = [draw.choice([0.0, 0.5, 1.0]) for _ in range(count)]
        odds = [float(draw.randint(-3, 3)) for _ in range(count)]  # many ties
        answerable = [draw.random() < 0.5 for _ in range(count)]
        scores = [score if has else 0.0 for score, has in zip(scores, answerable, strict=True)]

        def at(threshold: float) -> float:
            rows = zip(scores, odds, answerable, strict=True)  # noqa: B023
            return 100 * sum(float(not has) if odd > threshold else score for score, odd, has in rows) / count  # noqa: B023

        best, threshold = best_threshold(scores, odds, answerable)
        assert best == pytest.approx(max(at(value) for value in (-9.0, *odds)))
        assert best == pytest.approx(at(threshold))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("squad", {"predictions": ["a"], "references": [[]]}, "question 0 has no reference"),
        ("squad", {"predictions": [], "references": []}, "nothing to compare"),
        ("squad", {"predictions": ["a", None], "references": [["a"], ["b"]]}, "pair 1 holds null"),
        ("squad_v2", {"predictions": ["a"], "references": [["a", None]]}, "pair 0 holds null"),
        ("squad_v2", {"predictions": ["a"], "references": [["a"]], "null_odds": [1.0, 2.0]}, "but 2 null_odds"),
    ],
)
def test_squad_refuses_what_it_cannot_compare(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        METRICS.get(name)().compute(**arguments)


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_declares_which_figures_are_better(name: str) -> None:
    assert any("higher_is_better" in vars(cls) for cls in METRICS.get(name).__mro__)
    assert METRICS.get(name).higher_is_better is True


def test_tasks_say_the_direction_of_their_figures() -> None:
    for name in TASKS:
        task = TASKS.get(name)
        assert (task.direction("loss"), task.direction("perplexity"), task.direction(task.metric)) == (
            "lower",
            "lower",
            "higher",
        )
    assert TASKS.get("squad").direction("best_f1_threshold") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 4 + 1 = 5.The answer is: 5", Fraction(5)),
        ("The answer is 1,234.50.", Fraction(2469, 2)),
        ("The final answer is: $-3$.", Fraction(-3)),
        ("#### 50%", Fraction(50)),
        ("#### 1\n#### 20/35", Fraction(4, 7)),  # the last
        ("The answer is: 7\nQuestion: and now?", Fraction(7)),  # its line
        ("the ANSWER IS: \\sqrt{2}", "\\sqrt{2}"),
        ("#### 1/0", "1/0"),
        ("#### 1/2/3", "1/2/3"),
        ("The answer is: 1e99999999", "1e99999999"),
        ("The answer is:", None),
        ("It is 5.", None),
        ("The answer is : 5", Fraction(5)),
        ("The answer is: 5. That answer isn't odd", "5. That answer isn't odd"),
        ("That answer isn't 5", None),
        ("Their xanswer is 5", None),
        ("The answer is: 1,2,3", "1,2,3"),
        ("The answer is: 1,234,567", Fraction(1234567)),
        ("", None),
    ],
)
def test_the_final_answer_is_read(text: str, expected: Fraction | str | None) -> None:
    assert final_answer(text) == expected


def test_final_answers_are_compared_by_value() -> None:
    assert compute("final_answer", [("The answer is: 0.50", "#### 1/2"), ("The answer is: x", "#### X")]) == 0.5
    with pytest.raises(DataError, match="a reference names no final answer"):
        compute("final_answer", [("#### 1", "1")])


def test_contains_known_answers() -> None:
    metric = METRICS.get("contains")()
    predictions = ["It is a  CAT.", "concatenate", "a dog", ""]
    assert metric.compute(predictions=predictions, references=[["cat", "x"], ["cat"], ["a  Dog!", "Dog"], ["a"]]) == {
        "contains": 3 / 4
    }
    for references in ([["a"], []], [["a"], [" "]]):
        with pytest.raises(DataError, match="none of them empty"):
            metric.compute(predictions=["a", "b"], references=references)
