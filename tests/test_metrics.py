"""The text metrics: known answers, and what evaluate does behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from zinit.errors import ConfigError, DataError
from zinit.metrics import METRICS

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


@pytest.mark.parametrize("name", list(METRICS))
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


@pytest.mark.parametrize("name", list(METRICS))
def test_a_bad_batch_takes_what_was_added_before_with_it(name: str) -> None:
    metric = METRICS.get(name)()
    metric.add(prediction="b", reference="c")
    with pytest.raises(DataError, match="Mismatch"):
        metric.compute(predictions=["a"], references=[])
    assert metric.compute(predictions=["a"], references=["a"]) == {name: 1.0}


@pytest.mark.parametrize("name", list(METRICS))
def test_pairs_may_be_added_bit_by_bit(name: str) -> None:
    metric = METRICS.get(name)()
    metric.add(prediction="a", reference="a")
    metric.add_batch(predictions=["b"], references=["c"])
    assert metric.compute() == {name: 0.5}


def test_metrics_touch_no_disk_and_listing_them_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from zinit.metrics import METRICS; names = list(METRICS)\n"
        "assert 'evaluate' not in sys.modules and 'rouge_score' not in sys.modules\n"
        "for name in names:\n"
        "    metric = METRICS.get(name)()\n"
        "    metric.add(prediction='a', reference='a')\n"
        "    assert os.listdir() == []\n"
        "    assert metric.compute() == {name: 1.0}\n"
    )
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_METRICS_CACHE": str(tmp_path / "metrics")}
    environment = {**os.environ, **home, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    here = tmp_path / "here"
    here.mkdir()
    workers = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=here) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert not (tmp_path / "metrics").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".lock")]
