"""Labelled images, read for both tasks: the Hub's Parquet shards, tables, lists and CoOp's split files."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from tests.tasks.vit import balanced, make_image, save_classes, save_vtab, task
from zinit import demo
from zinit.data.images import read_image
from zinit.data.labelled.few_shot import draw_shots, few_shot_split
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.sources import read_images
from zinit.errors import DataError
from zinit.tasks.vtab.lists import vtab_layout

NAMES = ("ant", "bee", "cow", "dog")


def read(source: Path | str, **how: Any) -> Parts:
    return read_images(str(source), Reading(**how), demo.base_to_novel)


def records(numbers: range, kind: Any = None, image: Any = None) -> datasets.Dataset:
    """Record i shows image i of class i % 4."""
    cells = []
    for i in numbers:
        buffer = io.BytesIO()
        make_image(i % 4, i).save(buffer, "PNG")
        cells.append(buffer.getvalue() if image is not None else {"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(
        {"image": image or datasets.Image(), "label": kind or datasets.ClassLabel(names=[*NAMES])}
    )
    return datasets.Dataset.from_dict({"image": cells, "label": [i % 4 for i in numbers]}, features=features)


def save_shards(folder: Path, *, hashed: bool = False) -> Path:
    """40 training images in three files, 8 for the test in one."""
    folder.mkdir(parents=True)
    end = "-0a1b2c3d" if hashed else ""
    for shard, numbers in enumerate((range(14), range(14, 28), range(28, 40))):
        records(numbers).to_parquet(folder / f"train-{shard:05d}-of-00003{end}.parquet")
    records(range(40, 48)).to_parquet(folder / f"test-00000-of-00001{end}.parquet")
    (folder / "unlabelled-00000-of-00002.parquet").write_bytes(b"is not read")
    return folder


@pytest.mark.parametrize("where", [".", "data"])
@pytest.mark.parametrize("hashed", [False, True])
def test_shards_are_read_in_their_order(tmp_path: Path, where: str, hashed: bool) -> None:
    save_shards(tmp_path / "set" / where, hashed=hashed)
    (tmp_path / "set" / "README.md").write_text("---\n---\n")
    found = read(tmp_path / "set")
    assert found.labels == [*NAMES]
    assert found.val is None
    assert found.test is not None
    for examples, first in ((found.train, 0), (found.test, 40)):
        assert [example.label for example in examples] == [NAMES[i % 4] for i in range(first, first + len(examples))]
        for i, example in enumerate(examples, start=first):
            assert read_image(example.image).tobytes() == make_image(i % 4, i).tobytes()
    assert (len(found.train), len(found.test), len(found)) == (40, 8, 48)
    end = "-0a1b2c3d" if hashed else ""
    assert found.train[15].where.endswith(f"train-00001-of-00003{end}.parquet, record 2")


def test_shards_train_both_tasks(tmp_path: Path) -> None:
    root = save_shards(tmp_path / "data")
    of_vtab = task(root)
    assert balanced(of_vtab) | {"read": 48, "train": 40, "held_out": 8} == of_vtab.data_report()
    split = few_shot_split(str(root), None, read, train=True, labels=None, dropped=["cow"], seed=0)
    names, training, tested, counts = split
    assert names == ["ant", "bee", "dog"]
    assert (len(training), len(tested)) == (30, 6)
    assert counts == {"read": 48, "dropped": 12, "lines_skipped": 0, "unused": 0}


def test_shards_that_are_missing_or_there_twice_are_named(tmp_path: Path) -> None:
    root = save_shards(tmp_path / "data")
    (root / "train-00001-of-00003.parquet").rename(tmp_path / "kept")
    with pytest.raises(
        DataError, match=r"of the 3 files that train-00000-of-00003\.parquet is one of, 00001 is missing"
    ):
        read(tmp_path)
    (tmp_path / "kept").rename(root / "train-00001-of-00003.parquet")
    save_shards(tmp_path / "again")
    with pytest.raises(DataError, match=r"the same part of the data twice: .*again.*00000.* and .*data.*00000"):
        read(tmp_path)
    whole = root / "train-00000-of-00003.parquet"
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DataError, match=r"train-00000-of-00003\.parquet is not a readable Parquet file"):
        read(root)
    (tmp_path / "one").mkdir()
    records(range(4)).to_parquet(tmp_path / "one" / "some.parquet")
    with pytest.raises(DataError, match=r"no train\.parquet\. Name one of them: --data .*some\.parquet"):
        read(tmp_path / "one")
    assert len(read(tmp_path / "one" / "some.parquet").train) == 4


def test_no_shard_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    read(save_shards(tmp_path / "data"))
    assert not cache.exists()


def test_what_a_record_must_hold(tmp_path: Path) -> None:
    raw = records(range(4), image=datasets.Value("binary"))
    raw.to_parquet(tmp_path / "raw.parquet")
    for i, example in enumerate(read(tmp_path / "raw.parquet").train):
        assert read_image(example.image).tobytes() == make_image(i % 4, i).tobytes()
    empty = records(range(4)).to_list()
    empty[2]["image"] = {"bytes": None, "path": "/etc/hosts"}
    unseen = records(range(4)).features
    datasets.Dataset.from_list(empty, features=unseen).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet, record 3: the field 'image' holds no image"):
        read_image(read(tmp_path / "empty.parquet").train[2].image)
    records(range(4), kind=datasets.Value("int64")).to_parquet(tmp_path / "numbers.parquet")
    assert read(tmp_path / "numbers.parquet").train[3].label == "3"
    with pytest.raises(DataError, match="expected the names of the classes, which the text tower reads"):
        read(tmp_path / "numbers.parquet", named=True)
    datasets.Dataset.from_dict({"image": ["a.png"], "label": ["x"]}).to_parquet(tmp_path / "paths.parquet")
    with pytest.raises(DataError, match=r"the field 'image' holds .*; expected images"):
        read(tmp_path / "paths.parquet")


@pytest.mark.parametrize(
    ("label", "why"), [(None, "must be .* None"), ("", "must be .* ''"), (-1, "is -1"), (4, "is 4")]
)
def test_a_record_without_a_class_is_named_or_noted(tmp_path: Path, label: Any, why: str) -> None:
    named = label != ""
    table = records(range(4), kind=None if named else datasets.Value("string")).data.table
    labels = [0, label, 2, 3] if named else ["ant", label, "cow", "dog"]
    pq.write_table(table.set_column(1, table.field(1), [labels]), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=rf"data\.parquet, record 2: 'label' {why}"):
        read(tmp_path / "data.parquet")
    found = read(tmp_path / "data.parquet", on_bad="skip")
    assert [example.label for example in found.train] == ["ant", "cow", "dog"]
    assert len(found.skipped) == 1


def test_parts_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": records(range(12)), "dev": records(range(4)), "extra": records(range(4))}
    found = datasets.DatasetDict(parts)

    def load(name: str, config: str | None = None, split: str | None = None) -> Any:
        if config is not None:
            return datasets.DatasetDict(extra=parts["extra"])
        return found if split is None else records(range(int(split[len("train[:") : -1])))

    monkeypatch.setattr(datasets, "load_dataset", load)
    whole = read("some/set")
    assert (len(whole.train), len(whole.val or []), whole.test) == (12, 4, None)
    assert whole.train[4].where == "some/set:train, record 5"
    assert len(read("some/set:train[:7]").train) == 7
    assert read("some/set:extra").whole
    assert len(read("some/set:small:extra").train) == 4
    with pytest.raises(DataError, match=r"Name one: --data some/set:small:PART"):
        read("some/set:small:dev")
    found = datasets.DatasetDict(all=parts["train"])
    assert len(read("some/set").train) == 12


def test_split_files_and_tables_serve_both_tasks(tmp_path: Path) -> None:
    save_classes(tmp_path / "coop", 6, NAMES)
    entries = {part: [[f"{n}/{i}.png", 3 - c, n] for c, n in enumerate(NAMES) for i in numbers]
               for part, numbers in (("train", range(3)), ("val", range(3, 4)), ("test", range(4, 6)))}  # fmt: skip
    (tmp_path / "coop" / "split_zhou_Mine.json").write_text(json.dumps(entries))
    found = task(tmp_path / "coop")
    assert found.labels == [*reversed(NAMES)]  # by their numbers
    assert balanced(found) | {"train": 16, "held_out": 8} == found.data_report()
    assert balanced(task(tmp_path / "coop", split="train800"))["held_out"] == 4

    save_classes(tmp_path / "table", 3, NAMES)
    lines = [f"{n}/{i}.png,{n}" for n in NAMES for i in range(3)]
    (tmp_path / "table" / "train.csv").write_text("\n".join(["path,class", *lines[::2]]))
    (tmp_path / "table" / "test.csv").write_text("\n".join(["path,class", *lines[1::2], "gone.png,", "../x.png,ant"]))
    with pytest.raises(DataError, match=r"test\.csv, line 8: class is empty"):
        few_shot_split(str(tmp_path / "table"), None, read, train=True, labels=None, dropped=(), seed=0)

    def skipping(source: str | None) -> Parts:
        return read(str(source), on_bad="skip")

    names, training, tested, counts = few_shot_split(
        str(tmp_path / "table"), None, skipping, train=True, labels=None, dropped=(), seed=0
    )
    assert names == [*NAMES]
    assert [example.label for example in training] == [line.split(",")[1] for line in lines[::2]]
    assert len(tested) == 6
    assert counts == {"read": 14, "dropped": 0, "lines_skipped": 2, "unused": 0}


def test_vtabs_lists_are_for_vtab_alone(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "kitti")
    assert read(root, layouts=[vtab_layout("train800", None)]).dataset == "kitti"
    with pytest.raises(DataError, match="at least two sub-folders"):
        read(root)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_half_of_each_class_is_tested_on(tmp_path: Path, count: int) -> None:
    save_classes(tmp_path, count, NAMES)
    args: dict[str, Any] = {"train": True, "labels": None, "dropped": ()}
    _, training, tested, _ = few_shot_split(str(tmp_path), None, read, seed=0, **args)
    half = max(1, count // 2)
    assert Counter(e.label for e in tested) == dict.fromkeys(NAMES, half)
    assert Counter(e.label for e in training) == {n: count - half for n in NAMES if count > half}
    assert {*training, *tested} == {*read(tmp_path).train}
    if count == 7:
        assert few_shot_split(str(tmp_path), None, read, seed=0, **args)[2] == tested
        assert few_shot_split(str(tmp_path), None, read, seed=1, **args)[2] != tested


def test_another_shot_is_drawn_for_one_that_cannot_be_read(tmp_path: Path) -> None:
    examples = []
    for i in range(8):
        file = tmp_path / f"{i}.png"
        make_image(0, i).save(file)
        if i % 2:
            file.write_bytes(file.read_bytes()[:60])
        examples.append(Labelled(file, "ant"))
    drawn, counts = draw_shots(examples, 3, ["ant"], seed=0, few="error", on_bad="skip")
    assert all(int(str(example.image)[-5]) % 2 == 0 for example in drawn)
    assert len(drawn) == 3
    assert counts["train_not_drawn"] + counts["train_skipped_unreadable"] == 5
    with pytest.raises(DataError, match="class 'ant' has 4 images for 5 shots"):
        draw_shots(examples, 5, ["ant"], seed=0, few="error", on_bad="skip")
    drawn, counts = draw_shots(examples, 5, ["ant"], seed=0, few="use_all", on_bad="skip")
    assert (len(drawn), counts["train_skipped_unreadable"], counts["classes_with_fewer_shots"]) == (4, 4, 1)
    with pytest.raises(DataError, match=r"class 'bee' has 0 images .*from 1 on"):
        draw_shots(examples, 1, ["ant", "bee"], seed=0, few="use_all", on_bad="error")


def test_no_part_beside_a_whole_file_is_overlooked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    records(range(20)).to_parquet(tmp_path / "train.parquet")
    records(range(20, 24)).to_parquet(tmp_path / "validation.parquet")
    records(range(24, 30)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    found = read(tmp_path)
    assert [len(part or []) for part in (found.train, found.val, found.test)] == [20, 4, 6]
    records(range(30, 32)).to_parquet(tmp_path / "data" / "test-00001-of-00002.parquet")
    with pytest.raises(DataError, match="files of two data sets"):
        read(tmp_path)
    (tmp_path / "data" / "test-00001-of-00002.parquet").rename(tmp_path / "data" / "test-00001-of-00001.parquet")
    with pytest.raises(DataError, match="numbered beyond the 1 files"):
        read(tmp_path)


def test_a_column_that_names_parts_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("path,label,Split\na.png,red,train\n")
    with pytest.raises(DataError, match=r"has a column 'Split', which is not read.*train\.csv, test\.csv"):
        read(tmp_path / "all.csv")
