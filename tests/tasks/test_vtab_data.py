"""VTAB-1k: every kind of data; what cannot be used is named or counted."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.shared import SHARED, needs_data
from tests.tasks.vit import balanced, make_image, save_classes, save_vtab, task, task_pixels
from zinit import demo
from zinit.errors import DataError
from zinit.tasks.vtab.task import VTAB_TASKS


def test_the_layout_of_vtab(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "eurosat")
    final, selection = task(root), task(root, split="train800")
    assert (len(final.train_stream), len(final.held_out_stream)) == (12, 6)
    assert (len(selection.train_stream), len(selection.held_out_stream)) == (8, 4)
    assert final.labels == [str(label) for label in range(10)]  # eurosat's, whatever occurs
    assert balanced(final)["read"] == 18
    assert final.data_report()["test_images_of_vtab"] == 5_400
    assert final.collate(final.held_out_stream, [1, 4])["labels"].tolist() == [1, 1]
    assert task(save_vtab(tmp_path / "mine")).labels == ["0", "1", "2"]
    assert [e.image for e in selection.held_out_examples] == [
        root / "images" / "val200" / f"{i:06d}.png" for i in range(4)
    ]


def test_a_folder_of_several_tasks(tmp_path: Path) -> None:
    save_vtab(tmp_path / "kitti")
    save_vtab(tmp_path / "svhn")
    assert len(task(tmp_path, dataset="kitti").labels) == VTAB_TASKS["kitti"].classes == 4
    with pytest.raises(DataError, match=r"several tasks: kitti, svhn.*task\.dataset=kitti"):
        task(tmp_path)
    with pytest.raises(DataError, match=r"no task 'dtd'.*found kitti, svhn"):
        task(tmp_path, dataset="dtd")


BAD_LINES = {
    "images/train800/000001.png two": r"whole number from 0; got 'images/train800/000001\.png two'",
    "images/train800/000001.png -1": "whole number from 0",
    "images/train800/000001.png 1.0": "whole number from 0",
    "images/train800/000001.png": "whole number from 0",
    "images/train800/000001.png 4": "the label is 4, but kitti has 4 classes",
    "../../etc/passwd.png 1": "leaves the folder",
    "/etc/passwd.png 1": "leaves the folder",
    "images/train800/none.png 1": "there is no image",
    "images/truncated.png 1": "damaged or truncated",
    "images/bomb.png 1": "more than the|too many pixels",
    "images/text.png 1": "no image that can be read",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: str) -> None:
    root = save_vtab(tmp_path / "kitti")
    whole = (root / "images" / "train800" / "000000.png").read_bytes()
    (root / "images" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "text.png").write_text("no image")
    if "bomb" in line:
        Image.new("1", (12_000, 12_000)).save(root / "images" / "bomb.png")
    file = root / "train800val200.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], line, *lines[5:]]))
    with pytest.raises(DataError, match=BAD_LINES[line]) as caught:
        task(root)
    assert str(caught.value).startswith(f"{file}, line 6: ")
    found = task(root, on_bad="skip")
    report = balanced(found)
    assert report["read"] == 19
    assert report["train"] == 12
    assert report["lines_skipped"] + report["train_skipped"] == 1
    assert str(file) in report["reasons"][0]


def test_bad_lists(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "kitti")
    (root / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"there is no list .*val200\.txt"):
        task(root, split="train800", on_bad="skip")
    (root / "test.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"test\.txt lists no image"):
        task(root, on_bad="skip")
    (root / "test.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"test\.txt is not UTF-8 text: byte 0 cannot be read"):
        task(root)
    (root / "test.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        task(root)
    (root / "test.txt").write_text("images/test/none.png 0\n")
    with pytest.raises(DataError, match="nothing is left to evaluate on"):
        task(root, on_bad="skip")
    other = save_vtab(tmp_path / "mine")
    (other / "test.txt").write_text("images/test/000000.png 1000000\n")
    with pytest.raises(DataError, match="the labels go up to 1000000, but there are only 13 images"):
        task(other)
    with pytest.raises(DataError, match="there is no"):
        task(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a folder of images"):
        task(root / "test.txt")


def test_one_folder_is_split_class_by_class(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets")
    first, again, other = task(root), task(root), task(root, seed=1)
    assert first.labels == ["cat", "dog"]
    assert [sum(e.label == name for e in first.held_out_examples) for name in first.labels] == [2, 2]
    assert balanced(first)["train"] == 36
    assert not {e.image for e in first.train_examples} & {e.image for e in first.held_out_examples}
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    selection = task(root, split="train800")  # the tenth for the test stays untouched
    assert balanced(selection)["not_used"] == 4
    test = {e.image for e in first.held_out_examples}
    assert not test & {e.image for e in (*selection.train_examples, *selection.held_out_examples)}
    assert len(selection.held_out_examples) == 6


@pytest.mark.parametrize("evaluated", ["test", "val"])
def test_folders_with_parts(tmp_path: Path, evaluated: str) -> None:
    save_classes(tmp_path / "train", 5)
    save_classes(tmp_path / evaluated, 3, start=5)
    assert (len(task(tmp_path).train_stream), len(task(tmp_path).held_out_stream)) == (10, 6)
    if evaluated == "test":
        save_classes(tmp_path / "validation", 2, start=8)
        assert (len(task(tmp_path).train_stream), len(task(tmp_path).held_out_stream)) == (14, 6)
        assert len(task(tmp_path, split="train800").held_out_stream) == 4
    (tmp_path / evaluated / "dog").rename(tmp_path / evaluated / "cow")
    with pytest.raises(DataError, match=r"class 'cow' is none of the 2 that are trained \(cat, dog\)"):
        task(tmp_path)


def test_parquet(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    def encoded(label: int, number: int) -> dict[str, Any]:
        buffer = BytesIO()
        make_image(label, number).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    images = [encoded(i % 2, i) for i in range(20)]
    features = Features({"img": ImageFeature(), "kind": ClassLabel(names=["cat", "dog"])})
    named = Dataset.from_dict({"img": images, "kind": [i % 2 for i in range(20)]}, features=features)
    named.to_parquet(tmp_path / "named.parquet")
    with pytest.raises(DataError, match=r"no column 'label' or .*; it has 'img', 'kind'.*task\.fields=IMAGE,LABEL"):
        task(tmp_path / "named.parquet")
    found = task(tmp_path / "named.parquet", fields=("img", "kind"))
    assert found.labels == ["cat", "dog"]
    assert balanced(found)["train"] == 18
    index = next(i for i, e in enumerate(found.train_examples) if e.where.endswith("record 4"))
    expected = task_pixels(make_image(1, 3))
    assert torch.equal(found.collate(found.train_stream, [index])["images"][0], expected)

    images[6]["bytes"] = images[6]["bytes"][:100]
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    plain = Dataset.from_dict({"image": images, "label": [10 * (i % 2) for i in range(20)]}, features=features)
    (tmp_path / "parts").mkdir()
    plain.to_parquet(tmp_path / "parts" / "train.parquet")
    plain.select(range(4)).to_parquet(tmp_path / "parts" / "test.parquet")
    with pytest.raises(DataError, match=r"train\.parquet, record 7.* is damaged or truncated"):
        task(tmp_path / "parts")
    found = task(tmp_path / "parts", on_bad="skip")
    assert found.labels == ["0", "10"]
    counts = {"train": 15, "held_out": 4, "train_skipped": 1, "train_skipped_also_held_out": 4}
    assert balanced(found) | counts == found.data_report()
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        task(tmp_path / "bad.parquet")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str) -> Any:
        if name != "some/flowers":
            raise FileNotFoundError(f"no {name}\nand more")
        images = [make_image(i % 2, i) for i in range(12)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "lily"])})
        whole = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(12)]}, features=features)
        parts = {"train": range(6), "validation": range(6, 8), "test": range(8, 12)}
        return datasets.DatasetDict({part: whole.select(rows) for part, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    final, selection, one = task("some/flowers"), task("some/flowers", split="train800"), task("some/flowers:train")
    assert [len(t.train_stream) for t in (final, selection, one)] == [8, 6, 4]
    assert [len(t.held_out_stream) for t in (final, selection, one)] == [4, 2, 2]
    assert final.labels == ["rose", "lily"]  # in the order of their numbers
    assert final.held_out_examples[1].label == "lily"
    assert balanced(selection)["not_used"] == 4
    with pytest.raises(DataError, match="some/flowers has no part 'dev'; it has train, validation, test"):
        task("some/flowers:dev")
    with pytest.raises(DataError, match=r"there is no folder no/such, and the Hub did not .*: no no/such$"):
        task("no/such")


def test_csv_without_what_is_needed(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("filepath,label\na.png,x\na.png,\n")
    with pytest.raises(DataError, match=r"data\.csv, line 3: label is empty"):
        task(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("name,label\na.png,x\n")
    with pytest.raises(DataError, match=r"no column 'image' or .* for the image; it has 'name', 'label'"):
        task(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="lists no image"):
        task(tmp_path / "data.csv")


def embedded(dataset: str) -> tuple[list[str], dict[str, list[tuple[Image.Image, int]]]]:
    """What `zinit.demo.labelled_images` promises."""
    names = [f"{dataset} {i}" for i in range(4)]
    sizes = {"train800": 16, "val200": 8, "test": 12}
    return names, {part: [(make_image(i % 4, i), i % 4) for i in range(n)] for part, n in sizes.items()}


def test_the_embedded_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "labelled_images", embedded)
    final, selection = task(None), task(None, split="train800", dataset="textures")
    assert (len(final.train_stream), len(final.held_out_stream)) == (24, 12)
    assert (len(selection.train_stream), len(selection.held_out_stream)) == (16, 8)
    assert final.labels[0] == "digits 0"
    assert selection.labels[0] == "textures 0"
    assert final.collate(final.train_stream, [17])["labels"].tolist() == [1]
    assert balanced(selection)["not_used"] == 12


@needs_data
def test_real_caltech101() -> None:
    root = SHARED / "data" / "caltech101"
    lists = task(root)  # train.txt and test.txt beside one folder, an image's folder is its class
    report = balanced(lists)
    assert (report["train"], report["held_out"], report["classes"]) == (536, 280, 102)
    expected = root / "101_ObjectCategories" / "accordion" / "image_0001.jpg"
    assert lists.held_out_examples[0].image == expected
    assert lists.labels[int(lists.collate(lists.held_out_stream, [0])["labels"])] == "accordion"
    assert torch.equal(lists.collate(lists.held_out_stream, [0])["images"][0], task_pixels(Image.open(expected)))
    folders = balanced(task(root / "101_ObjectCategories"))
    assert (folders["read"], folders["classes"]) == (816, 102)


@needs_data
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_real_mnist(tmp_path: Path, on_bad: str) -> None:
    root = SHARED / "data" / "mnist_pngs"
    table = task(root, on_bad=on_bad)  # train.csv and test.csv
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "test").symlink_to(root / "test")
    folders = task(tmp_path, on_bad=on_bad)
    for found in (table, folders):
        report = balanced(found)
        assert (report["train"], report["held_out"]) == (600, 400)
        assert found.labels == [str(digit) for digit in range(10)]
    assert sorted(e.label for e in table.train_examples) == sorted(e.label for e in folders.train_examples)
    example = next(e for e in table.train_examples if str(e.image).endswith("train/0/28325.png"))
    assert example.label == "0"


def test_labels_stay_with_their_images_after_one_that_cannot_be_read(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", 4)
    save_classes(tmp_path / "test", 3, start=5)
    for part in ("train", "test"):
        (tmp_path / part / "cat" / "0.png").write_bytes(b"no image")
    found = task(tmp_path, on_bad="skip")
    for stream, examples in (
        (found.train_stream, found.train_examples),
        (found.held_out_stream, found.held_out_examples),
    ):
        labels = found.collate(stream, range(len(stream)))["labels"].tolist()
        assert [found.classes[label] for label in labels] == [path.image.parent.name for path in examples]
        expected = torch.stack([task_pixels(Image.open(example.image)) for example in examples])
        assert torch.equal(found.collate(stream, range(len(stream)))["images"], expected)


def test_an_image_of_both_lists_is_not_trained_on(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "kitti")
    with (root / "train800val200.txt").open("a") as file:
        file.write("images/test/000002.png 2\n")
    found = task(root)
    assert balanced(found)["train_skipped_also_held_out"] == 1
    assert not {e.image for e in found.train_examples} & {e.image for e in found.held_out_examples}
