"""The embedded demo's reading comprehension, and the masked language model that was pretrained for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from zinit import demo
from zinit.demo import world

# `zinit.demo.questions` the module and `zinit.demo.questions` the function share a name: import from the module.
from zinit.demo.questions import documents

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def paragraphs(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [paragraph for article in document["data"] for paragraph in article["paragraphs"]]


def asked(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question, behind its context."""
    for paragraph in paragraphs(document):
        for question in paragraph["qas"]:
            yield paragraph["context"], question


def subjects_in(text: str) -> set[str]:
    """The people and towns that are named in a text."""
    here = world.build()
    return {name for name in here.people + here.towns if name in text}


# --- the data ------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_questions_are_a_function_of_their_seed() -> None:
    code = (
        "import hashlib, json; from zinit import demo;"
        "print(hashlib.sha256(json.dumps(demo.questions()).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {hashlib.sha256(json.dumps(demo.questions()).encode()).hexdigest()}
    assert documents(world.build(), seed=1) != documents(world.build(), seed=0)


@pytest.mark.integration
def test_importing_the_demo_loads_no_torch() -> None:
    code = "import sys; from zinit import demo; demo.questions(); demo.roberta_path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_documents_are_in_squads_format() -> None:
    ids: list[str] = []
    for document, least, most in zip(demo.questions(), (1200, 300), (2000, 300), strict=True):
        assert document.keys() == {"version", "data"}
        assert document["version"] == "v2.0"
        assert all(article.keys() == {"title", "paragraphs"} for article in document["data"])
        assert all(paragraph.keys() == {"context", "qas"} for paragraph in paragraphs(document))
        everything = [question for _, question in asked(document)]
        assert least <= len(everything) <= most
        assert all(question.keys() == {"id", "question", "answers", "is_impossible"} for question in everything)
        assert 0.28 < sum(question["is_impossible"] for question in everything) / len(everything) < 0.38
        ids += [question["id"] for question in everything]
    assert len(set(ids)) == len(ids)


def test_every_answer_starts_where_it_says() -> None:
    for document in demo.questions():
        for context, question in asked(document):
            assert bool(question["answers"]) != question["is_impossible"]
            for answer in question["answers"]:
                start, text = answer["answer_start"], answer["text"]
                assert context[start : start + len(text)] == text
                assert not context[start - 1].isalnum()
                assert not context[start + len(text)].isalnum()


def test_the_sentence_of_an_answer_is_about_the_subject_of_its_question() -> None:
    """Parsed back from the text with the relations' own templates, which the makers of the data do not use this way."""
    here = world.build()
    relations = {fact.relation for facts in here.facts.values() for fact in facts}
    for document in demo.questions():
        for context, question in asked(document):
            meant = [
                (relation, subject)
                for subject in subjects_in(question["question"])
                for relation in relations
                if question["question"] in (ask.format(s=subject) for ask in relation.asks)
            ]
            assert len(meant) == 1
            relation, subject = meant[0]
            told = [
                value
                for value in relation.values
                for template in relation.tells
                if world.Fact(subject, relation, value).tell(template) in context
            ]
            assert set(told) == {answer["text"] for answer in question["answers"]}


def test_train_and_dev_share_no_subject_and_no_paragraph() -> None:
    train, dev = demo.questions()
    held_out = world.build().held_out
    assert all(subjects_in(question["question"]) <= held_out for _, question in asked(dev))
    assert not any(subjects_in(question["question"]) & held_out for _, question in asked(train))
    contexts = [paragraph["context"] for document in (train, dev) for paragraph in paragraphs(document)]
    assert len(set(contexts)) == len(contexts)


# --- the shipped model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.roberta_path(), local_files_only=True)


def test_the_shipped_files_are_small_and_float16() -> None:
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in demo.roberta_path().iterdir()) < 2_500_000
    assert 1_000_000 < (demo.roberta_path() / "model.safetensors").stat().st_size < 2_000_000
    with safe_open(demo.roberta_path() / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_trunk_loads_whole() -> None:
    from transformers import RobertaModel

    model, info = RobertaModel.from_pretrained(
        demo.roberta_path(), add_pooling_layer=False, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert 600_000 < model.num_parameters() < 950_000


@pytest.mark.parametrize(
    "text",
    [
        "Where does Odra live?",
        "two  spaces \n\n\ttabs\r\n",
        "naïve façade, Übergröße",
        "日本語と한국어",
        "🦙👩‍👩‍👧 emoji",
        "don't , stop .",
    ],
)
def test_the_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == " " + text, "a text starts like a word in its middle, with a space"


def test_a_pair_is_joined_as_robertas_is(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.is_fast
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    first, second = ("Say", "Odra.")
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, second))
    encoding = tokenizer(first, second)
    assert encoding["input_ids"] == [0, *a, 2, 2, *b, 2]
    assert encoding.keys() == {"input_ids", "attention_mask"}
    assert tokenizer(first)["input_ids"] == [0, *a, 2]


def test_offsets_meet_the_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    for document in demo.questions():
        for context, question in list(asked(document))[::5]:
            encoding = tokenizer(question["question"], context, return_offsets_mapping=True)
            assert len(encoding["input_ids"]) < 180
            inside = [
                offset
                for offset, side in zip(encoding["offset_mapping"], encoding.sequence_ids(), strict=True)
                if side == 1
            ]
            for answer in question["answers"]:
                start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                assert start in [offset[0] for offset in inside]
                assert end in [offset[1] for offset in inside]


def test_the_model_reads_answers_off_passages_of_held_out_entities(tokenizer: PreTrainedTokenizerBase) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    from scripts.pretrain_roberta import cloze_accuracy

    model = AutoModelForMaskedLM.from_pretrained(demo.roberta_path(), local_files_only=True, dtype=torch.float32)
    assert cloze_accuracy(model, tokenizer, demo.questions()[1]) > 0.5


def test_pretraining_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import pretrain_roberta

    monkeypatch.setattr(pretrain_roberta, "islice", lambda source, size: islice(source, min(size, 200)))  # less data
    digests: list[list[str]] = []
    for run in ("a", "b"):
        pretrain_roberta.pretrain(tmp_path / run, steps=3, batch_size=2, peak=1e-3, seed=0)
        files = sorted((tmp_path / run).iterdir())
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def test_the_tasks_format_is_not_pretrained() -> None:
    """Wherever a pretraining document asks, it answers."""
    from scripts.pretrain_roberta import documents as pretraining

    here = world.build()
    pairs = [pair for pair in islice(pretraining(here, 0), 300) if pair[1] is not None]
    questions = {
        ask.format(s=x) for facts in here.facts.values() for f in facts for x in [f.subject] for ask in f.relation.asks
    }
    assert pairs
    assert not any(side in questions for pair in pairs for side in pair)
