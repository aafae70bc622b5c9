"""What goes in is what comes out plus what was skipped: hidden files, other suffixes, the same picture twice, EXIF."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from tests.tasks import clip
from tests.tasks.vit import balanced, make_image, save_classes, save_vtab, task
from zinit.data import images
from zinit.data.labelled.parts import Parts, Reading
from zinit.data.labelled.sources import read_images
from zinit.errors import CheckpointError, DataError
from zinit.train.checkpoint import check_identity


def read(source: Path, **how: Any) -> Parts:
    return read_images(str(source), Reading(**how), lambda: ([], {}))


def test_hidden_files_count_at_no_depth(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets", 10)
    clean = task(root)
    for name in (".ipynb_checkpoints", "__MACOSX", "deep/.thumbnails"):
        shutil.copytree(root / "cat", root / "dog" / name)
    (root / "dog" / "._0.png").write_bytes(b"a fork")
    (root / ".DS_Store").write_bytes(b"")
    (root / "README.md").write_text("Pets.")
    found = task(root)
    report = balanced(found)
    assert report["files_skipped_hidden"] == 5  # a folder counts once
    assert report["files_skipped_outside_classes"] == 1
    assert report["read"] == 26
    assert found.fingerprint() == clean.fingerprint()


def test_hidden_files_are_no_part_of_any_layout(tmp_path: Path) -> None:
    save_classes(tmp_path / "set" / "train", 3)
    save_classes(tmp_path / "set" / "test", 2, start=5)
    (tmp_path / "set" / ".git").mkdir()
    save_classes(tmp_path / "set" / "unlabelled", 1)
    parts = read(tmp_path / "set")
    assert (len(parts.train), len(parts.test or ())) == (6, 4)
    assert parts.left_out == {"files_skipped_hidden": 1, "files_skipped_outside_parts": 1}
    (tmp_path / "tables" / ".cache").mkdir(parents=True)
    (tmp_path / "tables" / ".cache" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="at least two sub-folders"):  # not: no readable Parquet file
        read(tmp_path / "tables")
    root = save_vtab(tmp_path / "tasks" / "kitti")
    shutil.copytree(root, tmp_path / "tasks" / ".old")
    assert task(tmp_path / "tasks", dataset="kitti").labels == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"several tasks: kitti\. Name"):
        task(tmp_path / "tasks")


def test_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "validation")):
        save_classes(tmp_path / name, 2, start=10 * number)
    with pytest.raises(DataError, match=r"both val and validation, which are one part\. Keep one"):
        read(tmp_path)


def test_images_are_known_by_their_content_under_any_suffix(tmp_path: Path) -> None:
    """45 of 60 vanished once."""
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i, (suffix, format) in enumerate(
            (("", "JPEG"), (".JFIF", "JPEG"), (".jpe", "JPEG"), (".PNG", "PNG"), (".bin", "WEBP"), (".pbm", "PPM"))
        ):
            make_image(label == "dog", i).save(tmp_path / label / f"{i}{suffix}", format)
        (tmp_path / label / "boxes.xml").write_text("<boxes/>")
        (tmp_path / label / "empty").touch()
    left_out: Counter[str] = Counter()
    _, found = images.class_folders(tmp_path, left_out=left_out)
    assert len(found) == 12
    assert +left_out == {"files_skipped_no_image": 4}
    assert all(images.read_image(path).size == (18, 14) for path, _ in found)


def test_linked_folders_are_counted_not_followed(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets", 4)
    (root / "cat" / "again").symlink_to(root, target_is_directory=True)
    assert read(root).left_out == {"files_skipped_linked_folder": 1}


@pytest.mark.parametrize("own_parts", [True, False])
def test_the_same_picture_under_two_names_is_not_trained_and_tested_on(tmp_path: Path, own_parts: bool) -> None:
    """Another name, another file format: the pixels decide."""
    train = save_classes(tmp_path / "train", 10)
    if own_parts:
        save_classes(tmp_path / "test", 4, start=20)
        for label, name in enumerate(("cat", "dog")):
            make_image(label, 22).save(train / name / "copy.bmp")
    else:
        for label, name in enumerate(("cat", "dog")):
            for i in range(10):
                make_image(label, i).save(train / name / f"{i} (copy).bmp")
    found = task(tmp_path if own_parts else train)
    report = balanced(found)
    trained = {images.image_digest(images.read_image(example.image)) for example in found.train_examples}
    tested = {images.image_digest(images.read_image(example.image)) for example in found.held_out_examples}
    assert not trained & tested
    of_pairs = 2 * len(tested) - report["held_out"]  # the other file of each picture that is held out once
    assert report["train_skipped_also_held_out"] == (2 if own_parts else of_pairs) > 0


def test_a_damaged_image_is_named_with_its_own_line_after_one_that_is_held_out(tmp_path: Path) -> None:
    save_classes(tmp_path / "a", 3)
    (tmp_path / "a" / "cat" / "bad.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "a" / "cat" / "0.png", tmp_path / "a" / "cat" / "copy.png")
    (tmp_path / "test.csv").write_text("image,label\na/cat/0.png,cat\na/dog/0.png,dog\n")
    lines = ["image,label", "a/cat/copy.png,cat", "a/dog/1.png,dog", "a/cat/bad.png,cat"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train\.csv, line 4: .*bad\.png is no image"):
        task(tmp_path)


def test_published_lists_stay_as_they_are_and_shared_pictures_are_counted(tmp_path: Path) -> None:
    report = balanced(task(save_vtab(tmp_path / "kitti")))  # image i of every part is the same
    assert (report["train"], report["held_out"], report["train_also_held_out"]) == (12, 6, 10)


def test_another_shot_is_drawn_for_a_picture_that_is_tested_on(tmp_path: Path) -> None:
    clip.folders(tmp_path / "train", classes=4, each=3)
    clip.folders(tmp_path / "test", classes=4, each=2, start=50)
    for name in ("kind_0", "kind_1"):
        Image.open(tmp_path / "test" / name / "0.png").save(tmp_path / "train" / name / "copy.bmp")
    found = clip.task(tmp_path, shots=3)
    assert found._train_labels == [0, 0, 0, 1, 1, 1]
    assert not [path for path in found._train.sources if path.name == "copy.bmp"]
    assert clip.accounted(found)
    assert found.data_report()["train_skipped_also_held_out"] > 0
    with pytest.raises(DataError, match="class 'kind_0' has 3 images for 4 shots"):
        clip.task(tmp_path, shots=4)


def test_pixels_are_as_stored_and_other_orientations_are_counted(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets", 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in (root / "cat" / "0.png", root / "dog" / "1.png"):
        upright = images.read_image(path)
        upright.save(path, exif=exif)
        assert images.read_image(path).tobytes() == upright.tobytes()
    report = task(root).data_report()
    names = ("train_exif_orientation_ignored", "held_out_exif_orientation_ignored")
    assert sum(report.get(name, 0) for name in names) == 2


def test_one_class_is_enough_for_a_finished_run(tmp_path: Path) -> None:
    other = save_classes(tmp_path / "other", 3, ("dog",), first=1)
    known = task(save_classes(tmp_path / "pets", 6)).labels
    found = task(None, train=False, labels=known, held_out_data=str(other))
    assert [example.label for example in found.held_out_examples] == ["dog"] * 3
    assert found.collate(found.held_out_stream, [0])["labels"].tolist() == [1]
    with pytest.raises(DataError, match="at least two sub-folders"):
        task(other)


def test_a_run_that_cannot_go_on_names_the_rules_by_which_data_are_read() -> None:
    with pytest.raises(CheckpointError, match=r"examples was 'a' .* other rules since zinit 0\.2: hidden files"):
        check_identity(Path("run"), {"examples": "a"}, {"examples": "b"})
    with pytest.raises(CheckpointError, match="seed was 0") as caught:
        check_identity(Path("run"), {"seed": 0}, {"seed": 1})
    assert "other rules" not in str(caught.value)
