"""Base to novel: what is read, drawn and cropped."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import normalizers

from tests.shared import SHARED
from tests.tasks.clip import SIZE, accounted, clip, evaluate, folders, make_image, task, tokenizer
from zinit import demo
from zinit.data import crops as _crops
from zinit.errors import ConfigError, DataError
from zinit.models.loading import ClipProcessor
from zinit.tasks.base import TaskInputs
from zinit.tasks.base_to_novel.task import HALVES, BaseToNovel, BaseToNovelConfig
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator

CALTECH = SHARED / "data" / "caltech101" / "101_ObjectCategories"

# --- data ---------------------------------------------------------------------------------------------------------


def test_class_folders_are_split_in_halves_that_no_seed_moves(tmp_path: Path) -> None:
    t = task(folders(tmp_path, each=7))
    assert t.labels == [f"kind_{i}" for i in range(5)]
    assert t.classes == {"base": ["kind_0", "kind_1", "kind_2"], "novel": ["kind_3", "kind_4"]}  # ceil(5 / 2)
    counts = t.data_report()
    assert (counts["read"], counts["base_test"], counts["novel_test"]) == (35, 9, 6)
    assert (counts["train"], counts["train_not_drawn"], counts["train_of_novel_classes"]) == (6, 6, 8)
    assert accounted(t)
    again = task(tmp_path, seed=7)
    assert again._tested["base"][0].sources == t._tested["base"][0].sources
    other = task(tmp_path, split_seed=7)
    assert other._tested["base"][0].sources != t._tested["base"][0].sources
    tested = {*t._tested["base"][0].sources, *t._tested["novel"][0].sources}
    assert not tested & set(t._train.sources)


def test_the_seed_decides_the_shots(tmp_path: Path) -> None:
    folders(tmp_path, each=8)
    first, same, other = (task(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert first._train.sources == same._train.sources
    assert first._train.sources != other._train.sources
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    assert first._train_labels == [0, 0, 1, 1, 2, 2]
    for path, label in zip(first._train.sources, first._train_labels, strict=True):
        assert path.parent.name == f"kind_{label}"


def test_own_train_and_test_folders(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=3)
    folders(tmp_path / "test", classes=4, each=2, start=50)
    t = task(tmp_path)
    assert {path.parents[1].name for path in t._train.sources} == {"train"}
    assert {path.parents[1].name for path in t._tested["novel"][0].sources} == {"test"}
    assert (t.data_report()["base_test"], t.data_report()["novel_test"]) == (4, 4)
    assert accounted(t)


def split_file(root: Path, **changes: Any) -> Path:
    """Labels in another order than the names, one left out, as such files may have them."""
    folders(root / "images", classes=4, each=4)
    entries = [[f"kind_{c}/{i}.png", 9 - 2 * c, f"kind {c}"] for c in range(4) for i in range(4)]
    document = {"train": [e for e in entries if e[0][-5] in "01"], "val": [e for e in entries if e[0][-5] == "2"]}
    document["test"] = [e for e in entries if e[0][-5] == "3"]
    file = root / "split_zhou_Kinds.json"
    file.write_text(json.dumps(document | changes))
    return file


def test_split_files_of_coop(tmp_path: Path) -> None:
    file = split_file(tmp_path)
    for data in (file, tmp_path):
        t = task(data, folder="images")
        assert t.classes == {"base": ["kind 3", "kind 2"], "novel": ["kind 1", "kind 0"]}  # by label: 3, 5, 7, 9
        found = {f"{path.parent.name}/{path.name}" for path in t._train.sources}
        assert found == {"kind_3/0.png", "kind_3/1.png", "kind_2/0.png", "kind_2/1.png"}
        assert t.data_report()["unused"] == 4  # val
        assert accounted(t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": [["../x.png", 3, "kind 3"]]}, "leaves the folder"),
        ({"test": [["x.png", "3", "kind 3"]]}, r"test, entry 1: expected \[path, label, class name\]"),
        ({"test": [["x.png", 3, "kind 2"]]}, "label 3 is 'kind 2' here and 'kind 3' before"),
        ({"test": [["x.png", 8, "kind 3"]]}, "several labels share the class name 'kind 3'"),
        ({"train": None}, 'expected {"train"'),
    ],
)
def test_wrong_split_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(split_file(tmp_path, **changes), folder="images")


def rows(feature: Any, classes: int = 4, each: int = 4) -> Any:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    labels = [c for c in range(classes) for _ in range(each)]
    named = labels if hasattr(feature, "names") else [f"kind {c}" for c in labels]
    features = Features({"picture": ImageFeature(), "kind": feature})
    return Dataset.from_dict({"picture": [make_image(i) for i in range(len(labels))], "kind": named}, features=features)


def test_parquet_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    named = rows(datasets.ClassLabel(names=["z", "y", "x", "w"]))
    named.to_parquet(tmp_path / "data.parquet")
    t = task(tmp_path / "data.parquet", fields=("picture", "kind"))
    assert t.labels == ["z", "y", "x", "w"]
    assert accounted(t)
    position = int(t._train.sources[0].name.rpartition(" ")[2]) - 1
    expected = torch.from_numpy(np.asarray(_crops.plain(make_image(position), SIZE)).transpose(2, 0, 1).copy())
    assert torch.equal(t._train[0], expected)
    both = datasets.DatasetDict(train=named, validation=named.select(range(0, 16, 4)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: both if split is None else both[split])
    t = task("someone/kinds", fields=("picture", "kind"))
    assert (t.data_report()["base_test"], t.data_report()["novel_test"], t.data_report()["train"]) == (2, 2, 4)
    assert task("someone/kinds:train", fields=("picture", "kind")).data_report()["read"] == 16
    both = datasets.DatasetDict(train=rows(datasets.Value("string")))
    assert task("someone/kinds", fields=("picture", "kind")).labels == [f"kind {i}" for i in range(4)]
    with pytest.raises(DataError, match=r"has no column 'image'.*it has 'picture', 'kind'"):
        task("someone/kinds")
    numbers = both["train"].remove_columns("kind").add_column("kind", [0] * 16)
    both = datasets.DatasetDict(train=numbers)
    with pytest.raises(DataError, match="expected the names of the classes"):
        task("someone/kinds", fields=("picture", "kind"))


def test_a_truncated_image_in_parquet_names_its_record(tmp_path: Path) -> None:
    import datasets

    cells = []
    for i in range(16):
        file = io.BytesIO()
        make_image(i).save(file, "JPEG")
        whole = file.getvalue()
        cells.append({"bytes": whole[: len(whole) // 2] if i == 5 else whole, "path": None})
    table = datasets.Dataset.from_dict({"image": cells, "label": [f"k{i // 4}" for i in range(16)]})
    table.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet, record 6 is damaged or truncated"):
        task(tmp_path / "data.parquet")


def demo_data() -> tuple[list[str], dict[str, list[tuple[Image.Image, int]]]]:
    part = [(make_image(10 * label + i), label) for label in range(4) for i in range(3)]
    return ["red_disc", "blue disc", "disc", "box"], {"train": part, "test": part[::3]}


def test_demo_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "base_to_novel", demo_data, raising=False)
    t = task(None)
    assert t.classes == {"base": ["red_disc", "blue disc"], "novel": ["disc", "box"]}
    assert t.data_report() | {"read": 16, "train": 4, "base_test": 2, "novel_test": 2} == t.data_report()
    assert evaluate(t).samples[0]["expected"] == "red disc"


def test_caltech101() -> None:
    if not CALTECH.is_dir():
        pytest.skip("needs ../shared/data/caltech101")
    drop = "BACKGROUND_Google,Faces_easy"
    t = task(CALTECH, drop_classes=drop, shots=3)
    counts = t.data_report()
    assert counts["read"] == sum(1 for _ in CALTECH.rglob("*.jpg")) == 816
    assert (counts["dropped"], counts["base_classes"], counts["novel_classes"]) == (16, 50, 50)
    assert (counts["train"], counts["base_test"], counts["novel_test"]) == (150, 200, 200)
    assert accounted(t)
    assert not {"BACKGROUND_Google", "Faces_easy"} & set(t.labels)
    with pytest.raises(ConfigError, match=r"no class 'Faces_eazy'\. Did you mean 'Faces_easy'"):
        task(CALTECH, drop_classes="Faces_eazy")
    with pytest.raises(DataError, match="has 4 images for 16 shots"):
        task(CALTECH, shots=16)


def test_too_few_images_for_the_shots(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=16)
    folders(tmp_path / "test", classes=4, each=1, start=50)
    for i in range(1, 16):
        (tmp_path / "train" / "kind_1" / f"{i}.png").unlink()
    with pytest.raises(DataError, match="class 'kind_1' has 1 image for 16 shots"):
        task(tmp_path, shots=16)
    t = task(tmp_path, shots=16, few="use_all")
    assert t._train_labels == [0] * 16 + [1]
    assert t.data_report()["classes_with_fewer_shots"] == 1
    assert accounted(t)


def test_bad_images_are_named_or_counted(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=3)
    folders(tmp_path / "test", classes=4, each=3, start=50)
    bad = tmp_path / "train" / "kind_0" / "0.png"
    for file in (bad, tmp_path / "test" / "kind_3" / "0.png"):
        file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=r"0\.png is damaged or truncated"):
        task(tmp_path, shots=3)
    t = task(tmp_path, on_bad="skip")  # another image is drawn in its place
    assert t._train_labels == [0, 0, 1, 1]
    assert bad not in t._train.sources
    assert t.data_report()["test_skipped_unreadable"] == 1
    assert t.data_report()["novel_test"] == 5
    assert accounted(t)
    with pytest.raises(DataError, match="class 'kind_0' has 2 images for 3 shots"):
        task(tmp_path, shots=3, on_bad="skip")


def test_other_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        task(tmp_path / "nothing")
    with pytest.raises(DataError, match="at least two each"):
        task(folders(tmp_path / "a", classes=3))
    for settings in ({"template": "a photo"}, {"shots": 0}, {"few": "some"}, {"crop_scale": 0.0}, {"fields": ("a",)}):
        with pytest.raises(ConfigError):
            BaseToNovelConfig(**settings)  # pyright: ignore
    with pytest.raises(DataError, match="the text tower has room for 64"):
        task(folders(tmp_path / "b"), template="a very long sentence, which goes on and on and on, about a {}.")


def test_data_of_other_classes_is_refused_for_a_finished_run(tmp_path: Path) -> None:
    mine = folders(tmp_path / "a", classes=4)
    labels = task(mine).labels
    other = folders(tmp_path / "b", classes=5, each=2)
    with pytest.raises(DataError, match="has the classes kind_4, which are not among the 4 of the run"):
        task(mine, labels=labels, held_out_data=str(other))
    config = BaseToNovelConfig(shots=2, held_out_data=str(other), drop_classes="kind_4")
    t = BaseToNovel(TaskInputs(model=clip(), processor=ClipProcessor(tokenizer()), train=False, labels=labels), config)
    assert (t.data_report()["base_test"], t.data_report()["novel_test"], len(t.train_stream)) == (4, 4, 0)
    assert accounted(t)


def test_data_of_few_classes_is_measured_among_all_of_the_run_or_refused(tmp_path: Path) -> None:
    """One class of two would be right by chance alone if it stood for itself."""
    labels = task(folders(tmp_path / "a", classes=4)).labels
    model = clip()

    def evaluated(names: list[str]) -> BaseToNovel:
        folder = tmp_path / "_".join(names)
        for name in names:
            shutil.copytree(tmp_path / "a" / name, folder / name, dirs_exist_ok=True)
        config = BaseToNovelConfig(shots=2, held_out_data=str(folder))
        inputs = TaskInputs(model=model, processor=ClipProcessor(tokenizer()), train=False, labels=labels)
        return BaseToNovel(inputs, config)

    for names, half in ((labels[:1], "novel"), (labels[:2], "novel"), (labels[3:], "base")):
        message = rf"no image to test on of the {half} classes, kind_.*read: {6 * len(names)},.*give images of base and"
        with pytest.raises(DataError, match=message):
            evaluated(names)
    whole, both = evaluated(labels), evaluated([labels[0], labels[2]])  # one class of each half, among its two
    found = evaluate(both).metrics
    for half, offset in zip(HALVES, (0, len(whole._tested["base"][0])), strict=True):
        own = [place for place, label in enumerate(whole._tested[half][1]) if label == 0]
        predicted = whole._predict(make_accelerator(TrainConfig()), half, own, offset)
        assert found[f"{half}_accuracy"] == sum(predicted[place] == 0 for place in own) / 6
    assert found["harmonic_mean"] < 1
    assert both.data_report()["base_classes_without_test"] == 1
    with pytest.raises(DataError, match="at least two each"):
        task(folders(tmp_path / "c", classes=5), drop_classes="kind_0,kind_1")


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 36), (31, 90), (32, 32), (200, 65)])
def test_plain_images_are_those_of_the_reference_processor(shape: tuple[int, int]) -> None:
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    processor = transformers.CLIPImageProcessorPil(size=size, crop_size=crop, do_normalize=False, do_rescale=False)  # pyright: ignore
    image = make_image(0, *shape)
    expected = np.asarray(processor(image)["pixel_values"][0]).round().astype(np.uint8)
    assert np.array_equal(np.asarray(_crops.plain(image, SIZE)).transpose(2, 0, 1), expected)


def test_views_are_functions_of_seed_image_and_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path, classes=4)
    t = task(tmp_path, views=3)
    assert len(t.train_stream) == 3 * len(t._train.sources) == 12
    assert t._train_labels == [0, 0, 1, 1] * 3
    made = torch.stack(list(t._train))
    assert made.shape == (12, 3, SIZE, SIZE)
    assert len({view.numpy().tobytes() for view in made}) == 12
    assert torch.equal(t.collate(t.train_stream, [5, 2])["pixels"], made[[5, 2]])
    monkeypatch.setattr("zinit.data.images.KEPT_BYTES", 2 * 3 * SIZE * SIZE)  # two views stay, others are made again
    lean = task(tmp_path, views=3)
    assert len(lean._train._made) == 2
    assert torch.equal(torch.stack(list(lean._train)), made)


def test_a_crop_is_a_part_of_the_image() -> None:
    import random

    ramp = np.add.outer(np.arange(60), 3 * np.arange(60)).astype(np.uint8)  # a linear ramp: every crop is one too
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    covered = []
    for seed in range(60):
        values = np.asarray(_crops.random_crop(image, 16, 0.25, random.Random(seed)), dtype=float)[..., 0]
        rise, run = (values[-4] - values[3]).mean() / 9, (values[:, -4] - values[:, 3]).mean() / 9
        covered.append(abs(rise * 16) * abs(run * 16) / 3 / 3600)
        assert math.isclose(abs(rise) * 3 / abs(run), 1, abs_tol=0.45)  # the aspect lies within 3/4 and 4/3
        covered[-1] = math.copysign(covered[-1], run)
    assert 0.2 < min(map(abs, covered)) < 0.45
    assert 0.8 < max(map(abs, covered)) < 1.05
    assert 15 < sum(value < 0 for value in covered) < 45  # mirrored


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("crane", "crane_"), "cannot tell the classes 'crane' and 'crane_' apart: it reads the same tokens for both"),
        (
            ("red_fox", "red fox"),
            r"'red fox' and 'red_fox' apart.*'a photo of a red fox\.'.*-o task.drop_classes=red_fox",
        ),
        (("Owl", "owl"), "'Owl' and 'owl' apart"),
        (("__", "owl"), "the class '__' has no name that could be read"),
    ],
)
def test_classes_that_the_text_tower_cannot_tell_apart(names: tuple[str, str], message: str, tmp_path: Path) -> None:
    folders(tmp_path / "data")
    for place, name in enumerate(names):
        (tmp_path / "data" / f"kind_{place}").rename(tmp_path / "data" / name)
    processor = ClipProcessor(tokenizer())
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # as CLIP's
    with pytest.raises(DataError, match=message):
        task(tmp_path / "data", processor=processor)
    labels = sorted(folder.name for folder in (tmp_path / "data").iterdir())
    assert task(tmp_path / "data", processor=processor, labels=labels).labels == labels  # a finished run's stay


def test_labels_stay_with_their_images_after_one_that_cannot_be_read(tmp_path: Path) -> None:
    folders(tmp_path / "train", classes=4, each=2)
    folders(tmp_path / "test", classes=4, each=3, start=50)
    (tmp_path / "test" / "kind_0" / "0.png").write_bytes(b"no image")
    t = task(tmp_path, on_bad="skip")
    for half, names in t.classes.items():
        images, labels = t._tested[half]
        assert [names[label] for label in labels] == [images.sources[i].parent.name for i in images.kept]
