"""How captions are read and divided."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets import Image as DatasetsImage

from tests.shared import SHARED, needs_data
from tests.tasks import caption as made
from zinit.data.images import content_digest
from zinit.errors import DataError
from zinit.tasks.caption.records import Captioned, CaptionReading

COCO = SHARED / "data" / "coco"


def write(folder: Path, form: str) -> tuple[Path, Path]:
    """A source in a form, and the folder of its images."""
    if form == "karpathy":
        made.draw(folder / "pictures")
        (folder / "dataset.json").write_text(json.dumps(made.karpathy()))
        return folder / "dataset.json", folder / "pictures"
    made.draw(folder)
    if form == "coco":
        (folder / "captions_val.json").write_text(json.dumps(made.coco()))
        return folder / "captions_val.json", folder
    if form == "lines":
        (folder / "captions.jsonl").write_text(made.lines())
        return folder / "captions.jsonl", folder
    (folder / "captions.csv").write_text(made.table())
    return folder, folder


FORMS = ("karpathy", "coco", "lines", "table")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_image_once_with_all_its_captions(form: str, tmp_path: Path) -> None:
    source, images = write(tmp_path, form)
    reading = CaptionReading()
    found = reading.read(str(source))
    assert [(each.image, list(each.captions)) for each in found] == [
        (images / f"{number}.png", made.captions(number)) for number in range(6)
    ]
    parts = ["train", "train", "val", "test", "train", "train"] if form == "karpathy" else [""] * 6
    assert [each.part for each in found] == parts
    assert reading.counts == {"images_read": 6, "captions_read": 12}
    assert not reading.unused


def test_fields_and_the_folder_of_images_can_be_named(tmp_path: Path) -> None:
    made.draw(tmp_path / "pictures", 2)
    (tmp_path / "lists").mkdir()
    rows = [{"photo": f"{n}.png", "says": f"It is {n}.", "caption": "no", "author": "me"} for n in range(2)]
    (tmp_path / "lists" / "a.json").write_text(json.dumps(rows))
    reading = CaptionReading(fields=("photo", "says"), folder="../pictures")
    found = reading.read(str(tmp_path / "lists"))
    assert [(each.image.name, each.captions) for each in found] == [("0.png", ("It is 0.",)), ("1.png", ("It is 1.",))]
    assert reading.unused == {"unused_field_caption": 2, "unused_field_author": 2}
    absolute = CaptionReading(fields=("photo", "says"), folder=str(tmp_path / "pictures"))
    assert len(absolute.read(str(tmp_path / "lists"))) == 2


@pytest.mark.parametrize("kind", ["plain", "marked", "hub"])
def test_tables_may_hold_the_images_themselves(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in Parquet, columns that datasets marks as images, and the Hub's; one of them is damaged."""
    names = made.draw(tmp_path / "pictures", 4)
    files = [(tmp_path / "pictures" / name).read_bytes() for name in names]
    images = [{"bytes": file, "path": name} for file, name in zip([*files[:3], files[3][:20]], names, strict=True)]
    columns = {"image": images, "captions": [made.captions(number) for number in range(4)], "author": ["me"] * 4}
    table = Dataset.from_dict(columns)
    if kind != "plain":
        table = table.cast_column("image", DatasetsImage())
    table.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("zinit.data.records.load_hub", lambda source, split: table)
    reading = CaptionReading(on_bad="skip")
    found = reading.read("me/captions" if kind == "hub" else str(tmp_path / "a.parquet"))
    assert [content_digest(each.image) for each in found] == [hashlib.sha256(file).digest() for file in files[:3]]
    assert [list(each.captions) for each in found] == [made.captions(number) for number in range(3)]
    assert (reading.counts["images_read"], reading.counts["images_skipped"]) == (4, 1)
    assert "record 4, 3.png is damaged or truncated" in reading.reasons[0]
    assert reading.unused == {"unused_field_author": 4}


def test_records_may_say_their_part(tmp_path: Path) -> None:
    made.draw(tmp_path)
    rows = [{"image": f"{n}.png", "caption": "x", "split": ("Train", "validation", "test")[n % 3]} for n in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [each.part for each in CaptionReading().read(str(tmp_path / "a.json"))] == ["train", "val", "test"] * 2


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"image": "gone.png", "caption": "x"}, r"record 3: there is no image .*gone.png"),
    ({"image": "bad.png", "caption": "x"}, r"record 3: .*bad.png is no image that can be read"),
    ({"image": "../secret.png", "caption": "x"}, "leaves the folder"),
    ({"image": "a\0b", "caption": "x"}, "record 3"),
    ({"image": 7, "caption": "x"}, "record 3: the image must be a path; got int 7"),
    ({"image": " ", "caption": "x"}, "record 3: the image must be a path"),
    ({"image": "2.png", "caption": ""}, 'record 3: a caption must be text; got str ""'),
    ({"image": "2.png", "caption": None}, "record 3: a caption must be text; got NoneType null"),
    ({"image": "2.png", "caption": "\ud800"}, "half of a surrogate pair"),
    ({"image": "2.png", "caption": []}, "record 3: 2.png has no caption"),
    (
        {"image": "2.png", "caption": "x", "split": "fold7"},
        "its part is fold7; expected one of train, restval, test",
    ),
    ({"image": "0.png", "caption": "x", "split": "test"}, "record 1: its part is .*test"),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_what_cannot_be_used_is_one_message_or_a_counted_skip(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made.draw(tmp_path)
    (tmp_path / "bad.png").write_text("no image")
    rows = [{"image": f"{n}.png", "caption": [f"It is {n}.", "Two."]} for n in range(2)]
    source = tmp_path / "a.json"
    source.write_text(json.dumps([*rows, record]))
    with pytest.raises(DataError, match=f"(?s){message}.*on_bad=skip"):
        CaptionReading().read(str(source))
    reading = CaptionReading(on_bad="skip")
    found = reading.read(str(source))
    counts = reading.counts
    assert counts["images_read"] == len(found) + counts["images_skipped"]
    assert counts["captions_read"] == sum(len(each.captions) for each in found) + counts["captions_skipped"]
    lists = [row["caption"] if isinstance(row["caption"], list) else [row["caption"]] for row in [*rows, record]]
    assert counts["captions_read"] == sum(map(len, lists))
    assert counts["images_read"] == (2 if record["image"] == "0.png" else 3)
    assert counts["images_skipped"] == 1
    assert reading.reasons


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', r"expected {\"images\": \[...\], \"annotations\".*got dict"),
        ('{"images": 3}', r"expected {\"images\""),
        ('"x"', r"expected {\"images\""),
        ("[]", "holds no caption that can be used"),
        ("[1]", "record 1: expected an object with an image and a caption; got int 1"),
        (
            '[{"image": "0.png"}]',
            "record 1 has no field caption or captions or text or raw; it has image.*task.fie",
        ),
        ('{"images": [{"filename": "0.png"}]}', "image 1: expected an object with sentences"),
        ('{"images": [{"filename": "0.png", "sentences": ["x"]}]}', "image 1: expected an object with sentences"),
        ('{"images": [], "annotations": 1}', "'annotations' must be a list"),
        ('{"images": [{"id": 1}], "annotations": []}', "images, entry 1: expected an object with id and file_name"),
        ('{"images": [], "annotations": [{"image_id": [], "caption": "x"}]}', "annotations, entry 1: expected"),
        ('{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}', "image_id 5 of the annotations, which is"),
        ('{"images": [{"id": 1, "file_name": "0.png"}], "annotations": []}', "0.png has no caption"),
    ],
)
def test_a_file_of_another_form_is_one_message(content: str, message: str, tmp_path: Path) -> None:
    made.draw(tmp_path, 1)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        CaptionReading().read(str(tmp_path / "a.json"))


def test_what_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data file nobody/captions, and the Hub did not give a data set"):
        CaptionReading().read("nobody/captions")
    made.draw(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(made.lines(1))
    with pytest.raises(DataError, match=r"there is no folder .*pictures of images.*task.folder=NAME"):
        CaptionReading(folder="pictures").read(str(tmp_path / "a.jsonl"))


@needs_data
def test_real_images_are_read_with_their_captions(tmp_path: Path) -> None:
    """All of COCO's images that are there, and one that is not."""
    captions = json.loads((COCO / "captions_val2014_answer.json").read_text())
    names = sorted(path.name for path in (COCO / "images").iterdir())
    rows = [{"image": name, "caption": captions[str(int(Path(name).stem[-12:]))]} for name in [*names]]
    source = tmp_path / "coco.jsonl"
    source.write_text("\n".join(map(json.dumps, [*rows, {"image": "000000000001.jpg", "caption": "Gone."}])))
    reading = CaptionReading(on_bad="skip", folder=str(COCO / "images"))
    found = reading.read(str(source))
    assert len(found) == len(names) == 24
    assert reading.counts == {"images_read": 25, "captions_read": 25, "images_skipped": 1, "captions_skipped": 1}
    assert isinstance(found[0], Captioned)
