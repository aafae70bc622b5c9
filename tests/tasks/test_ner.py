"""Token classification: strict reading, windows, labels, loss, seqeval's figures, a whole run."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tasks.encoder import encoder_tokenizer, save_tiny_encoder, tiny_encoder
from zinit.config import PrefixConfig
from zinit.errors import ConfigError, DataError
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.train import train_run
from zinit.tasks.base import TaskInputs
from zinit.tasks.ner.sentences import Sentence, read_sentences
from zinit.tasks.ner.task import TokenClassification, TokenClassificationConfig
from zinit.tasks.ner.windows import make_windows
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator

COLUMNS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- -X- O

BRUSSELS NNP B-NP B-LOC
"""
PEOPLE = (("Ada", "Lovelace"), ("Björn", "Ek"), ("Chen", "陈"), ("Dora", "Maar"))
LABELS = ["O", "B-LOC", "B-PER", "I-PER"]


def rows(count: int = 20) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        person = PEOPLE[i % 4]
        tokens = [*(["really"] * (i % 3)), *person, "saw", "Rome", *(["again"] * (i % 5)), str(i)]
        tags = [*(["O"] * (i % 3)), "B-PER", "I-PER", "O", "B-LOC", *(["O"] * (i % 5)), "O"]
        found.append({"tokens": tokens, "ner_tags": tags})
    return found


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def make(folder: Path, content: Any = None, labels: list[str] | None = None, **settings: Any) -> TokenClassification:
    data = write(
        folder / ("data.txt" if isinstance(content, str) else "data.json"), rows() if content is None else content
    )
    config = TokenClassificationConfig(**{"max_length": 64, "stride": 8, **settings})
    return TokenClassification(
        TaskInputs(model=tiny_encoder(), processor=encoder_tokenizer(), data=data, labels=labels), config
    )


def read(source: str, labels: list[str] | None = None, columns: tuple[int, int] = (0, -1)) -> Any:
    return read_sentences(source, columns=columns, fields=("tokens", "ner_tags"), labels=labels)


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_columns(end: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes((COLUMNS.rstrip() + end).replace("\n", line).encode())
    sentences, empty = read(str(path))
    assert empty == 0
    assert [sentence.tokens for sentence in sentences] == [
        ("EU", "rejects", "German", "call"),
        ("Peter", "Blackburn"),
        ("BRUSSELS",),
    ]
    assert [sentence.tags for sentence in sentences] == [("B-ORG", "O", "B-MISC", "O"), ("B-PER", "I-PER"), ("B-LOC",)]
    assert sentences[1].where.endswith("train.txt, line 8")
    chunks, _ = read(str(path), columns=(0, 2))
    assert chunks[0].tags == ("B-NP", "B-VP", "B-NP", "I-NP")


def test_rows_of_any_kind_are_the_same(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    expected = [(tuple(row["tokens"]), tuple(row["ner_tags"])) for row in rows()]
    numbers = [{**row, "ner_tags": [LABELS.index(tag) for tag in row["ner_tags"]]} for row in rows()]
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=LABELS))})
    Dataset.from_list(numbers, features=features).to_parquet(tmp_path / "named.parquet")
    write(tmp_path / "text.json", rows())
    write(tmp_path / "numbers.jsonl", "\n".join(map(json.dumps, numbers)))
    for name, labels in (("named.parquet", None), ("text.json", None), ("numbers.jsonl", LABELS)):
        sentences, _ = read(str(tmp_path / name), labels)
        assert [(sentence.tokens, sentence.tags) for sentence in sentences] == expected


ROW = {"tokens": ["Ada", "ran"], "ner_tags": ["B-PER", "O"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.\w+ is empty"),
        ("\n \n", "holds no sentences"),
        ("EU NNP B-ORG\nran O\n", r"bad\.txt, line 2 has 2 columns, those before it have 3: 'ran O'"),
        ("EU\n", r"line 1 has 1 columns: 'EU'. Expected a token in column 0 and a tag in column -1"),
        ("EU NNP\n", r"line 1: the tag 'NNP' of the token 'EU' is none of O, B-X and I-X"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ([], "holds no sentences"),
        ({"tokens": []}, "expected a list of records with tokens and ner_tags; got dict"),
        ([ROW, 3], "record 2: expected an object with tokens and ner_tags; got int 3"),
        ([{"words": []}], r"record 1 has no field 'tokens'; it has words. If the data calls its fields otherwise"),
        ([{**ROW, "ner_tags": ["O"]}], "record 1 has 2 tokens, but 1 tags"),
        ([{**ROW, "ner_tags": "O O"}], "the field 'ner_tags' must be a list; got str"),
        ([{**ROW, "tokens": ["a", " "]}], "a token must be text that is not blank; got str"),
        ([{**ROW, "ner_tags": [1, 0]}], r"the tags are numbers, and the data does not name them.*-o task.labels="),
        ([{**ROW, "ner_tags": [None, 0]}], "a tag must be text or a number; got NoneType"),
    ],
)
def test_bad_input_is_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("bad.txt" if isinstance(content, str) else "bad.json")
    with pytest.raises(DataError, match=message):
        read(write(path, content))


def test_numbers_beyond_the_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.json", [{**ROW, "ner_tags": [2, 0]}])
    with pytest.raises(DataError, match=r"record 1: the tag 2 has no name; there are 2: O, B-PER\."):
        read(path, ["O", "B-PER"])


def test_labels_come_from_the_training_data_or_are_given(tmp_path: Path) -> None:
    assert make(tmp_path).labels == LABELS
    assert make(tmp_path, labels=LABELS[::-1]).labels == LABELS[::-1]
    config = TokenClassificationConfig(labels="O,B-PER,I-PER,B-LOC")  # pyright: ignore[reportArgumentType]
    assert config.labels == ("O", "B-PER", "I-PER", "B-LOC")
    dev = write(tmp_path / "dev.txt", COLUMNS)
    with pytest.raises(DataError, match=r"dev.txt, line 3: the tag 'B-ORG' of the token 'EU' is not among the labels"):
        make(tmp_path, held_out_data=dev)
    with pytest.raises(DataError, match="there is only one tag in the training data, 'O'"):
        make(tmp_path, [{"tokens": [str(i)], "ner_tags": ["O"]} for i in range(4)])


def test_a_finished_run_on_other_data_keeps_its_labels(tmp_path: Path) -> None:
    dev = write(tmp_path / "dev.json", rows(3))
    config = TokenClassificationConfig(held_out_data=dev)
    inputs = TaskInputs(model=tiny_encoder(), processor=encoder_tokenizer(), train=False)
    task = TokenClassification(replace(inputs, labels=[*LABELS, "B-X"]), config)
    assert (task.head.out_features, len(task.train_stream), len(task.held_out_sentences)) == (5, 0, 3)
    with pytest.raises(DataError, match="the tag 'B-LOC' of the token 'Rome' is not among the labels O, B-PER"):
        TokenClassification(replace(inputs, labels=["O", "B-PER", "I-PER"]), config)
    with pytest.raises(ConfigError, match="without training data, name the labels"):
        TokenClassification(inputs, config)


def test_counts_in_equal_counts_out(tmp_path: Path) -> None:
    repeated = [*rows(), *rows(), {"tokens": [], "ner_tags": []}]
    counts = make(tmp_path, repeated).data_report()
    assert counts["read"] == 41
    assert counts["train"] + counts["held_out"] + counts["train_skipped_also_held_out"] + counts["skipped_empty"] == 41
    assert counts["train_skipped_also_held_out"] > 0
    dev = write(tmp_path / "dev.json", rows(5))  # a benchmark's own parts stay as they are
    counts = make(tmp_path, held_out_data=dev).data_report()
    assert (counts["train"], counts["held_out"], counts["train_also_held_out"]) == (20, 5, 5)


@pytest.mark.parametrize("max_length", [20, 32, 64, 300])
def test_every_word_is_read_off_once_at_its_first_token(max_length: int, tmp_path: Path) -> None:
    task = make(tmp_path, max_length=max_length, stride=6)
    assert task.data_report()["held_out_skipped_words_without_tokens"] == 0
    split = 0
    for place, sentence in enumerate(task.held_out_sentences):
        windows = [window for window in task.held_out_windows if window.sentence == place]
        split += len(windows) > 1
        assert sorted(word for window in windows for word in window.words) == list(range(len(sentence.tokens)))
        for window in windows:
            assert len(window.ids) <= max_length
            assert window.ids[0] == 0
            assert window.ids[-1] == 2
            for word, position, label in zip(window.words, window.positions, window.labels, strict=True):
                first = encoder_tokenizer()(sentence.tokens[word], add_special_tokens=False)["input_ids"][0]
                assert window.ids[position] == first
                assert task._labels[label] == sentence.tags[word]
    assert split == task.data_report()["held_out_split_sentences"]
    assert bool(split) == (max_length < 60)
    words = task.data_report()["train_words"]
    assert sum(task.train_stream.counts) == words == sum(len(window.words) for window in task.train_windows)


def test_a_word_goes_to_the_window_that_shows_most_around_it(tmp_path: Path) -> None:
    """One token per word and space: seven one-letter words, windows of 7 tokens that share 3."""
    row = {"tokens": list("abcdefg"), "ner_tags": ["O"] * 7}
    task = make(tmp_path, [row, {"tokens": ["z"], "ner_tags": ["B-X"]}], labels=["O", "B-X"], max_length=9, stride=3)
    part = task.train_windows if len(task.train_windows) > 1 else task.held_out_windows
    # tokens a_b_c_d_e_f_g; windows a_b_c_d, c_d_e_f, e_f_g: c stands 2 from the edge of the first, 0 in the second
    assert [window.words.tolist() for window in part] == [[0, 1, 2], [3, 4], [5, 6]]


def test_words_without_tokens_are_counted_and_taken_for_outside(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = encoder_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    content = [{"tokens": ["Ada", "\u200b", str(i)], "ner_tags": ["B-PER", "B-PER", "O"]} for i in range(10)]
    config = TokenClassificationConfig()
    data = write(tmp_path / "data.json", content)
    task = TokenClassification(TaskInputs(model=tiny_encoder(), processor=tokenizer, data=data), config)
    counts = task.data_report()
    assert (counts["train_skipped_words_without_tokens"], counts["held_out_skipped_words_without_tokens"]) == (9, 1)
    task.evaluate(make_accelerator(TrainConfig()))
    assert task.artifacts()["predictions.json"]["sentences"][0]["predicted"][1] == "O"


def test_loss_equals_that_of_a_loop_without_padding(tmp_path: Path) -> None:
    task = make(tmp_path, max_length=24)
    indices = list(range(0, len(task.train_stream), 3))
    found = task(task.collate(task.train_stream, indices))
    expected = torch.zeros(())
    for index in indices:
        window = task.train_windows[index]
        hidden = task.model(input_ids=torch.tensor(window.ids[None].astype(np.int64))).last_hidden_state
        for position, label in zip(window.positions, window.labels, strict=True):
            expected = expected + F.cross_entropy(task.head(hidden[0, position]), torch.tensor(label))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_evaluation_gives_known_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sentences, four entities, of which one is found whole and one is cut short; one is made up."""
    dev = [
        {"tokens": ["Ada", "Lovelace", "saw", "Rome"], "ner_tags": ["B-PER", "I-PER", "O", "B-LOC"]},
        {"tokens": ["Rome", "saw", "Dora"], "ner_tags": ["B-LOC", "O", "B-PER"]},
    ]
    task = make(tmp_path, held_out_data=write(tmp_path / "dev.json", dev))
    given = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "O"]]
    answers = [[(s, w, task._labels.index(tag)) for w, tag in enumerate(tags)] for s, tags in enumerate(given)]
    monkeypatch.setattr(task, "_predict", lambda indices: [answers[index] for index in indices])
    found = task.evaluate(make_accelerator(TrainConfig()))
    precision, recall = 1 / 3, 1 / 4
    assert found.metrics == pytest.approx(
        {
            "f1": 100 * 2 * precision * recall / (precision + recall),
            "precision": 100 * precision,
            "recall": 100 * recall,
            "accuracy": 100 * 3 / 7,
        }
    )
    assert found.counts == {"sentences": 2, "words": 7}
    assert found.examples == {"f1": [(200.0, 4.0), (0.0, 3.0)]}
    assert found.samples[0] == {
        "prompt": "Ada Lovelace saw Rome",
        "expected": "PER: Ada Lovelace; LOC: Rome",
        "output": "PER: Ada; LOC: Rome",
    }


def test_predictions_are_those_of_one_window_at_a_time(tmp_path: Path) -> None:
    task = make(tmp_path, max_length=24, held_out_data=write(tmp_path / "dev.json", rows(12)))
    torch.nn.init.normal_(task.head.weight, std=1.0)
    expected = []
    for window in task.held_out_windows:
        with torch.no_grad():
            logits = task.head(task.model(input_ids=torch.tensor(window.ids[None].astype(np.int64))).last_hidden_state)
        for word, position in zip(window.words, window.positions, strict=True):
            expected.append((window.sentence, int(word), int(logits[0, position].argmax())))
    assert len({label for _, _, label in expected}) > 1
    everything = range(len(task.held_out_windows))
    assert sorted(chain(*task._predict(everything))) == sorted(expected)
    halves = [*task._predict(everything[::2]), *task._predict(everything[1::2])]
    assert sorted(chain(*halves)) == sorted(expected)
    assert task.evaluate(make_accelerator(TrainConfig()), limit=2).counts["sentences"] == 2
    assert task.evaluate(make_accelerator(TrainConfig()), limit=0).metrics == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 62}, "hold 62 tokens of a sentence; that must be more than task.stride=62"),
        ({"max_length": 400}, "max_length is 400, but the model has room for 300 tokens"),
        (
            {"fields": ("tokens",)},
            r"fields must be a list of two names: the fields of tokens and tags; got \('tokens',\)",
        ),
        ({"held_out": 1.5}, "held_out must be a number between 0 and 1, both excluded; got 1.5"),
        ({"tag_column": "last"}, "tag_column must be a whole number; got 'last'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **settings)
    with pytest.raises(ConfigError, match="labels must be different names"):
        TokenClassificationConfig(labels=("O", "O"))


def test_no_embedded_data() -> None:
    with pytest.raises(ConfigError, match="has no embedded demo data: --data FILE"):
        TokenClassification(
            TaskInputs(model=tiny_encoder(), processor=encoder_tokenizer()), TokenClassificationConfig()
        )


def test_a_whole_run_learns(tmp_path: Path) -> None:
    config = RunConfig(
        backbone="roberta",
        task="ner",
        model=str(save_tiny_encoder(tmp_path / "model")),
        data=write(tmp_path / "data.json", rows(60)),
        prefix=PrefixConfig(length=4, parametrization="key_value"),
        train=TrainConfig(steps=40, batch_size=16, micro_batch_size=8, learning_rate=5e-2, warmup_steps=0),
        options=TokenClassificationConfig(max_length=64, stride=8, drift=3),
    )
    results = train_run(config, tmp_path / "run")
    frozen, adapted = results["metrics"]["base"], results["metrics"]["adapted"]
    assert adapted["loss"] < frozen["loss"] / 1.5
    assert adapted["accuracy"] > frozen["accuracy"]
    assert set(adapted) == {"loss", "f1", "precision", "recall", "accuracy", "drift"}
    assert frozen["drift"] == pytest.approx(0, abs=1e-12)
    assert 1e-4 < adapted["drift"] < 2
    assert results["counts"]["read"] == 60
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {role: own["rate"] for role, own in document["rates"].items()} == dict.fromkeys(
        ("gates", "prompts", "head"), 5e-2
    )
    assert sum(own["numbers"] for own in document["rates"].values()) == document["num_trainable"]
    for name, examples in json.loads((tmp_path / "run" / "examples.json").read_text()).items():
        assert sum(x for x, _ in examples) / sum(y for _, y in examples) == pytest.approx(adapted[name], rel=1e-5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["labels"] == LABELS
    assert evaluate_run(tmp_path / "run")["metrics"] == results["metrics"]
    fewer = write(tmp_path / "fewer.json", [{"tokens": ["in", "Rome"], "ner_tags": ["O", "B-LOC"]}])
    assert evaluate_run(tmp_path / "run", data=fewer)["counts"]["words"] == 2
    with pytest.raises(DataError, match="the tag 'B-MISC' of the token 'x' is not among the labels O, B-LOC, B-PER"):
        evaluate_run(tmp_path / "run", data=write(tmp_path / "more.json", [{"tokens": ["x"], "ner_tags": ["B-MISC"]}]))


def test_comments_are_no_tokens_and_the_wrong_line_is_named(tmp_path: Path) -> None:
    text = "# sent_id = 1\n#begin document (x); part 0\nAda B-PER\n# O\nslept O\n\n#\n#Oslo B-LOC\n#end document\n"
    skipped: Counter[str] = Counter()
    sentences, _ = read_sentences(
        write(tmp_path / "a.txt", text), columns=(0, -1), fields=("tokens", "ner_tags"), labels=None, skipped=skipped
    )
    assert [sentence.tokens for sentence in sentences] == [("Ada", "#", "slept"), ("#Oslo",)]
    assert skipped == {"skipped_comments": 4}
    assert make(tmp_path, text * 3).data_report()["skipped_comments"] == 12
    with pytest.raises(DataError, match=r"line 2 has 3 columns, those before it have 2: .*They begin in line 1"):
        read(write(tmp_path / "b.txt", "a O\nAda NNP B-PER\n"))


def test_bilou_tags_are_those_of_iobes(tmp_path: Path) -> None:
    text = "Ada B-PER\nKing I-PER\nLovelace L-PER\nsaw O\nOslo U-LOC\n"
    assert read(write(tmp_path / "a.txt", text))[0][0].tags == ("B-PER", "I-PER", "E-PER", "O", "S-LOC")
    config = ["O", "B-PER", "I-PER", "L-PER", "U-LOC"]
    numbers = [{"tokens": ["Ada", "Lovelace", str(i)], "ner_tags": [1, 3, 0]} for i in range(5)]
    data = write(tmp_path / "numbers.json", numbers)
    inputs = TaskInputs(model=tiny_encoder(), processor=encoder_tokenizer(), data=data)
    task = TokenClassification(inputs, TokenClassificationConfig(max_length=64, stride=8, labels=tuple(config)))
    assert task.labels == ["O", "B-PER", "I-PER", "E-PER", "S-LOC"]
    assert {tags for sentence in task.held_out_sentences for tags in sentence.tags} == {"O", "B-PER", "E-PER"}


def test_tables_and_numbers_as_tokens(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", "tokens,ner_tags\nAda slept,B-PER O\n")
    records = write(tmp_path / "a.json", [{"tokens": ["In", 1999, 0.5], "ner_tags": ["O", "O", "O"]}])
    assert [sentence.tokens for sentence in read(table)[0]] == [("Ada", "slept")]
    assert [sentence.tokens for sentence in read(records)[0]] == [("In", "1999", "0.5")]


def test_several_sources_are_read_in_order_and_counted(tmp_path: Path) -> None:
    files = tuple(write(tmp_path / f"{i}.json", rows(20)[i::2]) for i in range(2))
    dev = write(tmp_path / "dev.json", rows(25)[20:])
    inputs = TaskInputs(model=tiny_encoder(), processor=encoder_tokenizer(), data=files)
    task = TokenClassification(inputs, TokenClassificationConfig(max_length=64, stride=8, held_out_data=dev))
    counts = task.data_report()
    assert (counts["read"], counts["train"], counts["read_source_1"], counts["read_source_2"]) == (25, 20, 10, 10)


@pytest.mark.parametrize(("words", "max_length", "stride"), [(1, 12, 3), (40, 12, 0), (90, 12, 7), (300, 40, 35)])
def test_a_words_window_is_that_of_a_search_over_all(words: int, max_length: int, stride: int) -> None:
    draw = np.random.default_rng(words)
    tokens = tuple("x" * int(draw.integers(1, 6)) for _ in range(words))
    sentence = Sentence(tokens=tokens, tags=("O",) * words, where="")
    made = make_windows(
        encoder_tokenizer(), sentence, np.zeros(words, dtype=np.int64), place=0, max_length=max_length, stride=stride
    )
    first = np.cumsum([0, *(len(token) + 1 for token in tokens[:-1])])
    room, count = max_length - 2, sum(map(len, tokens)) + words - 1
    begins = np.arange(0, max(1, count - stride), room - stride)
    lasts = np.minimum(begins + room, count) - 1
    expected = np.argmax(np.minimum(first[:, None] - begins, lasts - first[:, None]), axis=1)
    whole = encoder_tokenizer()(" ".join(tokens))["input_ids"][1:-1]
    used = sorted(set(expected.tolist()))
    assert [sorted(window.words.tolist()) for window in made] == [
        np.flatnonzero(expected == number).tolist() for number in used
    ]
    assert [window.ids[1:-1].tolist() for window in made] == [whole[begins[n] : lasts[n] + 1] for n in used]


def test_memory_of_a_long_sentence_grows_with_its_length() -> None:
    """A file without blank lines is one sentence: words x windows would be 400 MB here."""
    words = 8_000
    sentence = Sentence(tokens=("a",) * words, tags=("O",) * words, where="")
    tokenizer, labels = encoder_tokenizer(), np.zeros(words, dtype=np.int64)
    tracemalloc.start()
    try:
        made = make_windows(tokenizer, sentence, labels, place=0, max_length=12, stride=2)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert sum(len(window.words) for window in made) == words


def test_fields_and_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    more = [row | {"id": str(i), "pos_tags": ["NN"] * (i % 2), "lemma": None} for i, row in enumerate(rows())]
    counts = make(tmp_path, more).data_report()
    assert {name: n for name, n in counts.items() if "unused" in name} == {
        "unused_field_id": 20,
        "unused_field_pos_tags": 10,
    }
    unused: Counter[str] = Counter()
    path = write(tmp_path / "a.txt", COLUMNS)
    lines = [line for line in COLUMNS.splitlines() if line.strip() and not line.startswith("-DOC")]
    read_sentences(path, columns=(0, -1), fields=("tokens", "ner_tags"), labels=None, unused=unused)
    assert unused == {"unused_field_column_1": len(lines), "unused_field_column_2": len(lines)}
    text = "".join(f"Ada{i} NNP B-PER\nslept VB O\n\n" for i in range(5))
    assert make(tmp_path, text).data_report()["unused_field_column_1"] == 10
