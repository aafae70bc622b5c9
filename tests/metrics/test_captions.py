"""Metrics of captions: known answers of the programs that published figures come from, and worked examples."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from importlib.util import find_spec
from typing import Any

import pytest

from tests.shared import SHARED, needs_data
from zinit.errors import ConfigError, DataError, ZinitError
from zinit.metrics import METRICS
from zinit.metrics.ptb import ptb_tokens

COCO = SHARED / "data" / "coco"
CAPTIONS = ("bleu", "caption_rouge_l", "cider_d")
# BLEU-1 to -4, ROUGE-L and CIDEr-D by COCO's scoring on Java's tokens. There "22 3/4" is one word for ROUGE-L and two
# for the others; here it is two: 0.44989 becomes 0.44981.
FIVE = (0.64111, 0.44639, 0.29414, 0.18816, 0.44981, 0.97924)
ONE = (0.31522, 0.18128, 0.11204, 0.07282, 0.27535, 0.69868)


def figures(predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in CAPTIONS:
        found |= METRICS.get(name)().compute(predictions=predictions, references=references, **options)
    return found


def first_against_the_others() -> tuple[list[str], list[list[str]]]:
    lines = (COCO / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    captions = [json.loads(line)["captions"] for line in lines]
    return [own[0] for own in captions], [own[1:] for own in captions]


@needs_data
def test_figures_of_five_caption_images_are_those_of_coco() -> None:
    found = figures(*first_against_the_others())
    assert found.pop("cider_d_images") == 56
    assert tuple(found) == ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "caption_rouge_l", "cider_d")
    assert [round(value, 5) for value in found.values()] == list(FIVE)


@needs_data
def test_figures_of_a_model_s_captions_are_those_of_coco_to_the_digit() -> None:
    expected = json.loads((COCO / "captions_val2014_answer.json").read_text())
    given = json.loads((COCO / "captions_val2014_fakecap_results.json").read_text())
    references = [[expected[str(entry["image_id"])]] for entry in given]
    found = figures([entry["caption"] for entry in given], references)
    assert found.pop("cider_d_images") == 653
    assert [round(value, 5) for value in found.values()] == list(ONE)


@needs_data
def test_splitting_at_blanks_gives_other_figures_and_only_on_request() -> None:
    found = figures(*first_against_the_others(), tokens="whitespace")
    assert found["cider_d"] < 0.8  # 0.765 on lower-case words; published figures are over "ptb"


@needs_data
def test_stored_tokens_of_coco_are_ours() -> None:
    """The file was made by an older tokenizer, which kept full stops and commas."""
    plain, stored = (json.loads((COCO / f"debug.{kind}.json").read_text()) for kind in ("ref", "tokenized_ref"))
    assert sum(map(len, plain.values())) == 20
    for image, captions in plain.items():
        for caption, tokens in zip(captions, stored[image], strict=True):
            assert list(ptb_tokens(caption)) == [token for token in tokens.split() if token not in (".", ",")]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("They're boys' bikes; we cannot say.", "they 're boys bikes we can not say"),
        ("It\u2019s a \u201cT-shirt\u201d \u2014 gonna buy it!", "it 's a t-shirt gon na buy it"),
        ("A well-lit kitchen/dining room & bath", "a well-lit kitchen/dining room & bath"),
        ("bread , butter and/or jam", "bread butter and/or jam"),
        ("On Main St. and 5th Ave. with Mrs. Hill, etc.", "on main st. and 5th ave. with mrs. hill etc."),
        ("watching T.V.", "watching t.v."),
        ("bottles of S. Pellegrino", "bottles of s. pellegrino"),
        ("vitamin C.", "vitamin c"),  # at the end of a text one letter is no initial
        ("a clock at 10:30, a price of 3,000.", "a clock at 10:30 a price of 3,000"),
        ("at 10:30am on a 7-eleven lot, 2x4 and 3-4", "at 10:30 am on a 7-eleven lot 2x4 and 3-4"),
        ("five o'clock (or six)", "five o'clock -lrb- or six -rrb-"),
        ("one.... two -- three --- four...", "one two three four"),
        ("\u732b\u304c \u5bdd\u308b", "\u732b\u304c \u5bdd\u308b"),
        ("", ""),
        (" . !", ""),
    ],
)
def test_words_are_split_as_in_the_penn_treebank(caption: str, expected: str) -> None:
    assert " ".join(ptb_tokens(caption)) == expected  # what Stanford's PTBTokenizer makes of them, less punctuation


def test_bleu_of_worked_examples() -> None:
    bleu = METRICS.get("bleu")()
    # 3 of 4 words, 1 of 3 pairs, 0 of 2 triples; the closest references have 4 words (the shorter of two) and 3.
    found = bleu.compute(predictions=["the the cat sat"], references=[["the cat sat down", "on a mat the cat"]])
    assert found["bleu_1"] == pytest.approx(3 / 4)
    assert found["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 2 / 3))
    assert found["bleu_3"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))
    assert found["bleu_4"] == 0.0
    # Over all images together, not their mean: 1 + 3 of 2 + 3 words; 5 words where the references have 6.
    both = bleu.compute(predictions=["a b", "d e f"], references=[["a c x"], ["d e f"]])
    assert both["bleu_1"] == pytest.approx(math.exp(1 - 6 / 5) * 4 / 5)
    shorter = bleu.compute(predictions=["d e f"], references=[["d e f g", "d e"]])  # both are one word away
    assert shorter["bleu_1"] == pytest.approx(1.0)
    closest = bleu.compute(predictions=["d e f"], references=[["d e f g", "d"]])
    assert closest["bleu_1"] == pytest.approx(math.exp(1 - 4 / 3))
    assert set(bleu.compute(predictions=[""], references=[["a"]]).values()) == {0.0}


def test_rouge_l_of_captions_takes_the_best_precision_and_the_best_recall() -> None:
    metric = METRICS.get("caption_rouge_l")()
    # "a cat" gives recall 1 and precision 2/3, "cat sat down" gives 2/3 twice.
    found = metric.compute(predictions=["a cat sat"], references=[["a cat", "cat sat down"]])
    precision, recall, beta = 2 / 3, 1.0, 1.2**2
    expected = (1 + beta) * precision * recall / (recall + beta * precision)
    assert found == {"caption_rouge_l": pytest.approx(expected)}
    two = metric.compute(predictions=["a cat sat", "x"], references=[["a cat", "cat sat down"], ["y", "."]])
    assert two["caption_rouge_l"] == pytest.approx(expected / 2)


def test_cider_d_of_a_worked_example() -> None:
    """Two images, so that an n-gram of one has the weight log 2 and one of both has none."""
    metric = METRICS.get("cider_d")()
    found = metric.compute(predictions=["a cat cat", "a dog"], references=[["a cat"], ["the dog", "a dog"]])
    weight = math.log(2)
    # Image 1: "a" weighs nothing. Words: candidate cat 2w, reference w; w * w / (2w * w). Pairs: the candidate's
    # "a cat" and "cat cat", the reference's "a cat". One word too many: exp(-1/72).
    first = (1 / 2 + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    # Image 2: words: "dog" of (the, dog), and "dog" of (dog); pairs: none, and "a dog".
    second = (weight / math.hypot(weight, weight) + 1 + 0 + 1) / 2
    assert found == {"cider_d": pytest.approx(10 * (first + second) / 4 / 2), "cider_d_images": 2}
    assert metric.compute(predictions=["a cat"], references=[["a cat"]]) == {"cider_d": 0.0, "cider_d_images": 1}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_of_other_scripts_are_split_on_request(name: str) -> None:
    pairs: Any = {"predictions": ["\u732b\u304c\u5bdd\u308b", "\u72ac"], "references": [["\u732b \u304c"], ["\u9ce5"]]}
    by_letters = METRICS.get(name)().compute(**pairs, tokens="characters")
    assert next(iter(by_letters.values())) > 0.0
    assert next(iter(METRICS.get(name)().compute(**pairs).values())) == 0.0
    with pytest.raises(ConfigError, match=r"no tokens 'words'.*'ptb', 'whitespace', 'characters'"):
        METRICS.get(name)().compute(**pairs, tokens="words")


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], [["a"], []], "image 1 has no reference"),
        ([], [], "nothing to compare"),
        (["a", None], [["a"], ["b"]], "pair 1 holds null"),
        (["a"], [["a"], ["b"]], "Mismatch"),
    ],
)
def test_what_cannot_be_compared_is_refused(name: str, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        METRICS.get(name)().compute(predictions=predictions, references=references)


def test_meteor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair: Any = {"predictions": ["a cat"], "references": [["a cat"]]}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs Java.*Install a Java runtime"):
        METRICS.get("meteor")().compute(**pair)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", None)
    with pytest.raises(ConfigError, match=r"package pycocoevalcap.*\[meteor\]"):
        METRICS.get("meteor")().compute(**pair)


def test_meteor_is_given_words_and_a_silent_program_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Program:
        def compute_score(self, references: Any, candidates: Any) -> tuple[float, list[float]]:
            asked.append((references, candidates))
            if len(asked) == 2:
                raise ValueError("could not convert string to float: ''")
            return 0.25, [0.25]

    monkeypatch.setattr(shutil, "which", lambda name: "/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor.meteor", types.SimpleNamespace(Meteor=Program))  # pyright: ignore[reportArgumentType]
    metric, pair = METRICS.get("meteor")(), {"predictions": ["A cat's hat."], "references": [["The cat", "a hat!"]]}
    assert metric.compute(**pair) == {"meteor": 0.25}
    assert asked == [({0: ["the cat", "a hat"]}, {0: ["a cat 's hat"]})]
    with pytest.raises(ZinitError, match=r"gave no figures.*java -version"):
        metric.compute(**pair)


@needs_data
@pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap (zinit[meteor])")
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_meteor_of_five_caption_images_is_that_of_coco() -> None:
    predictions, references = first_against_the_others()
    found = METRICS.get("meteor")().compute(predictions=predictions, references=references)
    assert found == {"meteor": pytest.approx(0.23744, abs=5e-4)}
