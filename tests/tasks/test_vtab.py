"""VTAB-1k: every kind of data, preprocessing, head and loss, models from local files, 19 tasks as one figure."""

from __future__ import annotations

import json
import pickle
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zinit
from zinit import demo
from zinit.config import PrefixConfig, TrainConfig
from zinit.errors import BackboneError, ConfigError, DataError
from zinit.hosts import load_timm
from zinit.run import evaluate_run, train_run
from zinit.settings import RunConfig, absolute_path, list_presets, read_preset
from zinit.tasks.vtab import VTAB, VTAB_TASKS, VTABConfig, paper_results, summarise, vpt_grid

SHARED = Path(__file__).parents[2].parent / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the real data in ../shared/data")
SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
ARCHITECTURE = "vit_tiny_patch16_224"


def tiny(**changes: Any) -> Any:
    """A random ViT without classifier: C 32, 16 patches; every weight random, as a trained one's are."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = VisionTransformer(**{**SHAPE, "num_classes": 0, **changes})
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_tiny(folder: Path) -> Path:
    """In timm's format."""
    folder.mkdir(exist_ok=True)
    save_file(tiny().state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "classifier": "head"}
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "model_args": SHAPE, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def picture(label: int, number: int) -> Image.Image:
    """Tells its class by its colour."""
    pixels = np.random.default_rng(100 * label + number).integers(0, 60, (14, 18, 3))
    pixels[..., label % 3] += 60 * (1 + label // 3)
    return Image.fromarray(pixels.astype(np.uint8))


def save_vtab(root: Path, *, classes: int = 3, train: int = 8, val: int = 4, test: int = 6) -> Path:
    """A task folder in the layout of 6.1.4."""
    lists: dict[str, list[str]] = {}
    for split, count in (("train800", train), ("val200", val), ("test", test)):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(i % classes, i).save(root / "images" / split / f"{i:06d}.png")
            lists.setdefault(split, []).append(f"images/{split}/{i:06d}.png {i % classes}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def task(data: Path | str | None, model: Any = None, **settings: Any) -> VTAB:
    given = {name: settings.pop(name) for name in ("train", "labels", "seed") if name in settings}
    config = VTABConfig(**settings)
    return VTAB(model or tiny(), None, None, config, data=data and str(data), **{"seed": 0, **given})


def balanced(found: VTAB) -> dict[str, Any]:
    """The report, checked: counts in equal counts out plus everything left out, by name."""
    report = found.data_report()
    left_out = ("train_skipped", "held_out_skipped", "lines_skipped", "train_skipped_also_held_out", "not_used")
    assert report["read"] == report["train"] + report["held_out"] + sum(report.get(name, 0) for name in left_out)
    assert report["train"] == len(found.train_stream) == len(found.train_examples)
    assert report["held_out"] == len(found.held_out_stream) == len(found.held_out_examples)
    return report


# What is read


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
    assert [e.picture for e in selection.held_out_examples] == [
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
    "images/train800/none.png 1": "there is no picture",
    "images/truncated.png 1": "damaged or truncated",
    "images/bomb.png 1": "more than the|too many pixels",
    "images/text.png 1": "no picture that can be read",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, line: str) -> None:
    root = save_vtab(tmp_path / "kitti")
    whole = (root / "images" / "train800" / "000000.png").read_bytes()
    (root / "images" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "text.png").write_text("no picture")
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
    with pytest.raises(DataError, match=r"test\.txt lists no picture"):
        task(root, on_bad="skip")
    (root / "test.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"test\.txt is not readable as UTF-8"):
        task(root)
    (root / "test.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git lfs pull"):
        task(root)
    (root / "test.txt").write_text("images/test/none.png 0\n")
    with pytest.raises(DataError, match="nothing is left to evaluate on"):
        task(root, on_bad="skip")
    other = save_vtab(tmp_path / "mine")
    (other / "test.txt").write_text("images/test/000000.png 1000000\n")
    with pytest.raises(DataError, match="the labels go up to 1000000, but there are only 13 pictures"):
        task(other)
    with pytest.raises(DataError, match="there is no"):
        task(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a folder of pictures"):
        task(root / "test.txt")


def save_classes(root: Path, count: int = 20, names: tuple[str, ...] = ("cat", "dog"), *, first: int = 0) -> Path:
    """One folder per class, drawn as the classes from ``first``."""
    for label, name in enumerate(names, start=first):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(label, i).save(root / name / f"{i}.png")
    return root


def test_one_folder_is_split_class_by_class(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets")
    first, again, other = task(root), task(root), task(root, seed=1)
    assert first.labels == ["cat", "dog"]
    assert [sum(e.label == name for e in first.held_out_examples) for name in first.labels] == [2, 2]
    assert balanced(first)["train"] == 36
    assert not {e.picture for e in first.train_examples} & {e.picture for e in first.held_out_examples}
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    selection = task(root, split="train800")  # the tenth for the test stays untouched
    assert balanced(selection)["not_used"] == 4
    test = {e.picture for e in first.held_out_examples}
    assert not test & {e.picture for e in (*selection.train_examples, *selection.held_out_examples)}
    assert len(selection.held_out_examples) == 6


@pytest.mark.parametrize("evaluated", ["test", "val"])
def test_folders_with_parts(tmp_path: Path, evaluated: str) -> None:
    save_classes(tmp_path / "train", 5)
    save_classes(tmp_path / evaluated, 3)
    assert (len(task(tmp_path).train_stream), len(task(tmp_path).held_out_stream)) == (10, 6)
    if evaluated == "test":
        save_classes(tmp_path / "validation", 2)
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
        picture(label, number).save(buffer, "PNG")
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
    expected = task_pixels(picture(1, 3))
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
    assert balanced(found) | {"train": 19, "held_out": 4, "train_skipped": 1} == found.data_report()
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        task(tmp_path / "bad.parquet")


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str) -> Any:
        if name != "some/flowers":
            raise FileNotFoundError(f"no {name}\nand more")
        pictures = [picture(i % 2, i) for i in range(12)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["rose", "lily"])})
        whole = datasets.Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(12)]}, features=features)
        parts = {"train": range(6), "validation": range(6, 8), "test": range(8, 12)}
        return datasets.DatasetDict({part: whole.select(rows) for part, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    final, selection, one = task("some/flowers"), task("some/flowers", split="train800"), task("some/flowers:train")
    assert [len(t.train_stream) for t in (final, selection, one)] == [8, 6, 4]
    assert [len(t.held_out_stream) for t in (final, selection, one)] == [4, 2, 2]
    assert final.labels == ["lily", "rose"]
    assert final.held_out_examples[1].label == "lily"
    assert balanced(selection)["not_used"] == 4
    with pytest.raises(DataError, match="some/flowers has no part 'dev'; it has train, validation, test"):
        task("some/flowers:dev")
    with pytest.raises(DataError, match="there is no folder no/such, and the Hub did not .*: no no/such$"):
        task("no/such")


def test_csv_without_what_is_needed(tmp_path: Path) -> None:
    picture(0, 0).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("filepath,label\na.png,x\na.png,\n")
    with pytest.raises(DataError, match=r"data\.csv, line 3: label is empty"):
        task(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("name,label\na.png,x\n")
    with pytest.raises(DataError, match=r"no column 'image' or .* for the image; it has 'name', 'label'"):
        task(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="lists no picture"):
        task(tmp_path / "data.csv")


def embedded(dataset: str) -> tuple[list[str], dict[str, list[tuple[Image.Image, int]]]]:
    """What `zinit.demo.pictures` promises."""
    names = [f"{dataset} {i}" for i in range(4)]
    sizes = {"train800": 16, "val200": 8, "test": 12}
    return names, {part: [(picture(i % 4, i), i % 4) for i in range(n)] for part, n in sizes.items()}


def test_the_embedded_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "pictures", embedded, raising=False)
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
    lists = task(root)  # train.txt and test.txt beside one folder, a picture's folder is its class
    report = balanced(lists)
    assert (report["train"], report["held_out"], report["classes"]) == (536, 280, 102)
    expected = root / "101_ObjectCategories" / "accordion" / "image_0001.jpg"
    assert lists.held_out_examples[0].picture == expected
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
    example = next(e for e in table.train_examples if str(e.picture).endswith("train/0/28325.png"))
    assert example.label == "0"


# What the model sees


def task_pixels(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """Aspect ratio not kept, nothing cropped."""
    return torch.from_numpy(np.array(image.convert("RGB").resize((16, 16), resample))).permute(2, 0, 1)


class Recorder(nn.Module):
    """Stands for a trunk, and keeps what it was given."""

    num_classes, num_features = 0, 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("normalisation", ["imagenet", "model", "none"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_matches_the_formula(tmp_path: Path, normalisation: Any, interpolation: Any) -> None:
    root = save_vtab(tmp_path / "kitti")
    config = VTABConfig(normalisation=normalisation, interpolation=interpolation)
    processor = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    model = Recorder()
    found = VTAB(model, processor, None, config, data=str(root), seed=0)
    found(found.collate(found.held_out_stream, [2]))
    resample = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    pixels = task_pixels(Image.open(root / "images" / "test" / "000002.png"), resample).double() / 255
    mean, std = {
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "model": (processor["mean"], processor["std"]),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }[normalisation]
    expected = torch.stack([(pixels[c] - mean[c]) / std[c] for c in range(3)])
    torch.testing.assert_close(model.seen[0].double(), expected, atol=1e-6, rtol=1e-6)


def test_loss_is_cross_entropy_of_a_linear_head_on_pooled_features(tmp_path: Path) -> None:
    found = task(save_vtab(tmp_path / "kitti"))
    batch = found.collate(found.train_stream, [0, 5, 2])
    expected = torch.zeros((), dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for image, label in zip(batch["images"], batch["labels"].tolist(), strict=True):
        x = ((image.float() / 255 - mean[:, None, None]) / std[:, None, None])[None]
        pooled = found.model.forward_features(x)[0, 0]  # pyright: ignore  # the class token, after the last norm
        logits = found.head.weight.double() @ pooled.double() + found.head.bias.double()
        expected -= logits[label] - logits.logsumexp(0)
    torch.testing.assert_close(found(batch).double(), expected, atol=1e-5, rtol=1e-5)
    assert found(batch).dtype == torch.float32


def test_the_head_is_the_seeds_and_stays_float32(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "kitti")
    a, b, c = task(root), task(root, tiny().bfloat16()), task(root, seed=1)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)
    assert b.head.weight.dtype == torch.float32
    assert not a.head.bias.any()
    loss = b(b.collate(b.train_stream, [0, 1]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, a(a.collate(a.train_stream, [0, 1])), atol=0.05, rtol=0.05)


def test_evaluation_and_features(tmp_path: Path) -> None:
    found = task(save_vtab(tmp_path / "kitti", test=70))
    features = found.features(found.held_out_stream)
    assert features.shape == (70, 32)
    assert not features.requires_grad
    alone = found.model(((found.collate(found.held_out_stream, [67])["images"].float() / 255) -
                        torch.tensor(found.mean).view(3, 1, 1)) / torch.tensor(found.std).view(3, 1, 1))  # fmt: skip
    torch.testing.assert_close(features[67], alone[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # a head that knows class 1 from all others by its label's own features
        found.head.weight.zero_()
        found.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    evaluation = found.evaluate(Accelerator(cpu=True))
    assert evaluation.metrics == {"accuracy": pytest.approx(sum(i % 3 == 1 for i in range(70)) / 70)}
    assert evaluation.counts == {"evaluated": 70}
    assert {sample["output"] for sample in evaluation.samples} == {"1"}
    assert {sample["expected"] for sample in evaluation.samples} == {"0", "1", "2"}
    assert evaluation.samples[0]["prompt"] == "test/000000.png"
    assert found.evaluate(Accelerator(cpu=True), limit=2).metrics == {"accuracy": 0.5}


def test_processes_share_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = task(save_vtab(tmp_path / "kitti", test=67))
    alone = found.evaluate(Accelerator(cpu=True))
    shares: list[list[Any]] = []

    def collect(share: list[Any]) -> list[Any]:
        shares.append(share)
        return [pair for share in shares for pair in share] if len(shares) == 3 else share + missing(share)

    def missing(share: list[Any]) -> list[Any]:  # until all have spoken: anything, for the rest
        return [(index, 0) for index in set(range(67)) - {index for index, _ in share}]

    monkeypatch.setattr("accelerate.utils.gather_object", collect)
    for rank in range(3):
        together = found.evaluate(SimpleNamespace(process_index=rank, num_processes=3))  # pyright: ignore
    assert together == alone
    assert sorted(index for share in shares for index, _ in share) == list(range(67))


def test_the_fingerprint_sees_pixels_labels_and_preprocessing(tmp_path: Path) -> None:
    root = save_vtab(tmp_path / "kitti")
    before = task(root).fingerprint()
    assert task(root, tiny(embed_dim=64)).fingerprint() == before
    assert task(root, normalisation="none").fingerprint() != before
    assert task(root, interpolation="bilinear").fingerprint() != before
    file = root / "train800val200.txt"
    lines = file.read_text()
    file.write_text(lines.replace("000003.png 0", "000003.png 1", 1))
    assert task(root).fingerprint() != before
    file.write_text(lines)
    assert task(root).fingerprint() == before
    picture(2, 77).save(root / "images" / "test" / "000005.png")
    assert task(root).fingerprint() != before


def test_another_size_resamples_the_positions(tmp_path: Path) -> None:
    root, model = save_vtab(tmp_path / "kitti"), tiny()
    handle = zinit.attach(model, PrefixConfig(length=3), seed=0)
    found = VTAB(model, None, handle, VTABConfig(image_size=24), data=str(root), seed=0)
    assert found.collate(found.train_stream, [0])["images"].shape == (1, 3, 24, 24)
    assert list(model.pos_embed.shape) == [1, 1 + 36, 32]
    assert not model.pos_embed.requires_grad
    assert found(found.collate(found.train_stream, [0, 1])).isfinite()
    assert found.train_stream.lengths[0] == 36
    with pytest.raises(ConfigError, match="a multiple of the patch's 4 pixels; got 18"):
        task(root, image_size=18)
    with pytest.raises(ConfigError, match="Recorder cannot change its picture's size"):
        task(root, Recorder(), image_size=24)


def test_drop_path_grows_with_depth(tmp_path: Path) -> None:
    root, model = save_vtab(tmp_path / "kitti"), tiny()
    expected = VisionTransformer(**SHAPE, num_classes=0, drop_path_rate=0.3)
    found = task(root, model, drop_path=0.3)
    for ours, theirs in zip(model.blocks, expected.blocks, strict=True):
        for name in ("drop_path1", "drop_path2"):
            rate = getattr(getattr(theirs, name), "drop_prob", 0.0)
            assert getattr(ours, name).drop_prob == pytest.approx(rate)
    batch = found.collate(found.train_stream, [0, 1, 2])
    plain = task(root)
    assert torch.equal(found.eval()(batch), plain.eval()(batch))
    assert not torch.equal(found.train()(batch), plain(batch))


def test_a_model_with_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without classifier"):
        task(save_vtab(tmp_path / "kitti"), tiny(num_classes=7))
    with pytest.raises(ConfigError, match="does not say how its input was normalised"):
        task(tmp_path / "kitti", normalisation="model")


def test_finished_runs_keep_their_classes(tmp_path: Path) -> None:
    root = save_classes(tmp_path / "pets", 4, ("ant", "cat", "dog"))
    other = save_classes(tmp_path / "other", 3, ("cat", "dog"))
    found = task(root, train=False, labels=["ant", "cat", "dog"], held_out_data=str(other))
    assert len(found.train_stream) == 0
    assert len(found.held_out_stream) == 6
    assert found.collate(found.held_out_stream, [0, 5])["labels"].tolist() == [1, 2]
    balanced(found)
    with pytest.raises(DataError, match=r"'cow' is none of the 2 .* unknown in all: cow, hen"):
        task(root, train=False, labels=["cat", "dog"],
             held_out_data=str(save_classes(tmp_path / "farm", 2, ("cow", "hen"))))  # fmt: skip


# A run


@pytest.mark.parametrize("method", ["zero-init", "full", "head-only", "lora", "logistic-regression"])
def test_a_run(tmp_path: Path, method: str) -> None:
    """Colours are learned on a model in a folder; the finished run is the same on its own data, and meets others."""
    root = save_vtab(tmp_path / "data", train=48, val=12, test=24)
    config = RunConfig(
        backbone="vit",
        task="vtab",
        model=str(save_tiny(tmp_path / "model")),
        data=str(root),
        method=method,
        prefix=PrefixConfig(length=4, init_std=0.1),
        train=TrainConfig(
            steps=20,
            batch_size=20,
            micro_batch_size=20,
            learning_rate=2e-2,
            warmup_steps=2,
            save_every=0,
            evaluate_every=0,
        ),
        options=VTABConfig(normalisation="model"),
    )
    results = train_run(config, tmp_path / "run")
    frozen, adapted = results["metrics"]["frozen"], results["metrics"]["adapted"]
    assert adapted["accuracy"] >= 0.9 > frozen["accuracy"]
    assert adapted["loss"] < frozen["loss"]
    assert results["counts"]["read"] == 84
    if method in ("zero-init", "head-only"):
        assert results["num_trainable"] == (3 * (4 * 32 + 4) if method == "zero-init" else 0) + 3 * (32 + 1)
    assert (tmp_path / "run" / "report.html").is_file()
    assert RunConfig.from_dict(json.loads((tmp_path / "run" / "run.json").read_text())["config"]) == config
    again = evaluate_run(tmp_path / "run")
    assert again["metrics"] == results["metrics"]
    elsewhere = evaluate_run(tmp_path / "run", data=str(save_classes(tmp_path / "other", 5, ("1", "2"), first=1)))
    assert elsewhere["counts"]["held_out"] == elsewhere["counts"]["read"] == 10
    assert elsewhere["metrics"]["adapted"]["accuracy"] >= 0.8  # not so if "1" were taken for the first class
    with pytest.raises(DataError, match="the class '7' is none of the 3 that are trained"):
        evaluate_run(tmp_path / "run", data=str(save_classes(tmp_path / "third", 2, ("1", "7"))))


# Models from local files


def flax(model: Any) -> dict[str, np.ndarray]:
    """A ViT's weights under the names and in the shapes of the original JAX archives, written out by hand."""
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((width, 21), dtype=np.float32),
        "head/bias": np.zeros(21, dtype=np.float32),
    }
    for layer in range(len(model.blocks)):
        there, here = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        for norm, flax_norm in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{there}/{flax_norm}/scale"] = state[f"{here}.{norm}.weight"]
            arrays[f"{there}/{flax_norm}/bias"] = state[f"{here}.{norm}.bias"]
        attention = f"{there}/MultiHeadDotProductAttention_1"
        for part, rows in zip(("query", "key", "value"), range(0, 3 * width, width), strict=True):
            weight, bias = (state[f"{here}.attn.qkv.{kind}"][rows : rows + width] for kind in ("weight", "bias"))
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{here}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{here}.attn.proj.bias"]
        for dense in (0, 1):
            arrays[f"{there}/MlpBlock_3/Dense_{dense}/kernel"] = state[f"{here}.mlp.fc{dense + 1}.weight"].T
            arrays[f"{there}/MlpBlock_3/Dense_{dense}/bias"] = state[f"{here}.mlp.fc{dense + 1}.bias"]
    return arrays


@pytest.fixture
def small_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's smallest ViT takes a second to make and 20 MB to save: the name stands for `tiny`'s shape here."""
    real = timm.create_model

    def create(name: str, **settings: Any) -> nn.Module:
        return real(name, **(SHAPE if name == ARCHITECTURE else {}), **settings)

    monkeypatch.setattr(timm, "create_model", create)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin"])
def test_local_weights_are_the_models(tmp_path: Path, small_architecture: None, suffix: str) -> None:
    source = tiny()
    file, state = tmp_path / f"weights{suffix}", source.state_dict()
    head = {"head.weight": torch.ones(9, 32), "head.bias": torch.ones(9)}
    if suffix == ".npz":
        np.savez(file, **flax(source))
    elif suffix == ".safetensors":
        save_file(state | head, file)
    else:
        torch.save({"model": state | head} if suffix == ".pth" else state, file)
    model, processor = load_timm(f"{ARCHITECTURE}:{file}", dtype=torch.float32)
    # Where the classifier is left out, timm keeps the trunk as it is.
    torch.testing.assert_close(model(IMAGES), source(IMAGES), atol=1e-6, rtol=1e-6)
    assert {"mean", "std", "interpolation", "input_size"} <= processor.keys()
    assert not model.training


def test_a_folder_of_timms_and_its_dtype(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    for source in (str(folder), folder, f"local-dir:{folder}"):
        model, processor = load_timm(source, dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(model.float()(IMAGES), tiny().bfloat16().float()(IMAGES))
        assert processor["mean"] == (0.5, 0.5, 0.5)
        assert processor["input_size"] == (3, 16, 16)


class Payload:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # pyright: ignore


def bad_weights(folder: Path) -> dict[str, Path]:
    files = {
        name: folder / name for name in ("deep.npz", "patch.npz", "wide.npz", "object.npz", "jpeg.npz", "alone.pth")
    }
    np.savez(files["deep.npz"], **flax(tiny(depth=4)))
    np.savez(files["patch.npz"], **flax(tiny(patch_size=8)))
    np.savez(files["wide.npz"], **flax(tiny(embed_dim=64)))
    np.savez(files["object.npz"], **flax(tiny()), extra=np.array([Payload()], dtype=object))
    files["jpeg.npz"].write_bytes(b"no archive")
    torch.save({"blocks": Payload()}, files["alone.pth"])
    for name, state in {
        "wide.pth": tiny(embed_dim=64).state_dict(),
        "deep.pth": tiny(depth=4).state_dict(),
        "shallow.pth": tiny(depth=2).state_dict(),
        "patch.pth": tiny(patch_size=8).state_dict(),
        "list.pth": [torch.ones(2)],
    }.items():
        torch.save(state, folder / name)
        files[name] = folder / name
    files["pickle.bin"] = folder / "pickle.bin"
    files["pickle.bin"].write_bytes(pickle.dumps(Payload()))
    files["cut.safetensors"] = folder / "cut.safetensors"
    save_file(tiny().state_dict(), files["cut.safetensors"])
    files["cut.safetensors"].write_bytes(files["cut.safetensors"].read_bytes()[:5000])
    files["pointer.pth"] = folder / "pointer.pth"
    files["pointer.pth"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    files["none.pth"] = folder / "none.pth"
    files["weights.h5"] = folder / "weights.h5"
    files["weights.h5"].write_bytes(b"other")
    return files


REFUSED = {
    "deep.npz": "has 4 layers, the model 3",
    "patch.npz": "patches of 8 x 8 pixels, the model 4 x 4",
    "wide.npz": "is 64 wide, the model 32",
    "object.npz": "allow_pickle=False",
    "jpeg.npz": "cannot be read as the weights",
    "alone.pth": "a pickle can run any code",
    "pickle.bin": "cannot be read|a pickle can run any code",
    "wide.pth": r"other shapes of .*\(\d+ in all\)",
    "deep.pth": r"beyond the model, blocks\.3\..* \(12 in all\)",
    "shallow.pth": r"it lacks blocks\.2\..* \(12 in all\)",
    "patch.pth": "patches of 8 x 8 pixels, the model 4 x 4",
    "list.pth": "holds no state dict",
    "cut.safetensors": "cannot be read as the weights",
    "pointer.pth": "git lfs pull",
    "none.pth": "there is no file of weights",
    "weights.h5": r"expected a file \.safetensors",
}


def test_wrong_weights_are_refused(tmp_path: Path, small_architecture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = bad_weights(tmp_path)
    assert files.keys() == REFUSED.keys()
    for name, expected in REFUSED.items():
        with pytest.raises(BackboneError, match=expected) as caught:
            load_timm(f"{ARCHITECTURE}:{files[name]}", dtype=torch.float32)
        assert name in str(caught.value)
    assert not (tmp_path / "ran").exists()


@needs_data
def test_a_real_pointer_is_refused() -> None:
    file = SHARED / "data" / "messy" / "lfs_pointer_vit_cifar10.pth"
    with pytest.raises(BackboneError, match="git lfs pull"):
        load_timm(f"{ARCHITECTURE}:{file}", dtype=torch.float32)


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, expected in {
        "vit_bose_patch16_224": "Near it: vit_base_patch16_224",
        f"vit_bose:{tmp_path / 'x.pth'}": "timm has no model 'vit_bose'",
        str(tmp_path / "x.pth"): "say of which model",
        str(tmp_path / "empty"): r"no config\.json",
        str(tmp_path / "nowhere"): "there is no model folder",
        f"local-dir:{tmp_path / 'nowhere'}": "there is no model folder",
        "vit_tiny_patch16_224": "cannot be loaded as a model of timm's",  # the Hub, offline
        "timm/vit_tiny_patch16_224.augreg_in21k": "cannot be loaded as a model of timm's",
    }.items():
        with pytest.raises(BackboneError, match=expected):
            load_timm(source, dtype=torch.float32)
    shutil.copy(save_tiny(tmp_path / "model") / "config.json", tmp_path / "empty")
    with pytest.raises(BackboneError, match="holds no weights"):
        load_timm(tmp_path / "empty", dtype=torch.float32)


def test_a_model_with_a_file_can_be_used_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert absolute_path("vit_base_patch16_224:x.npz") == f"vit_base_patch16_224:{tmp_path / 'x.npz'}"
    assert absolute_path("vit_base_patch16_224:y.npz") == "vit_base_patch16_224:y.npz"


# Nineteen tasks, one figure

PRINTED = {  # paper-facts 5.4: the paper's group means (Table 6), and two means of ours from the unrounded rows
    "Full": (75.88, 83.36, 47.64, 68.97, 65.57),
    "Bias": (73.3, 78.3, 44.1, 65.22, 62.05),
    "Adapter": (70.39, 77.11, 33.43, 60.31, 56.24),
    "Sidetune": (58.21, 68.12, 23.41, 49.91, 45.65),
    "VPT": (78.48, 82.43, 54.98, 71.97, 69.42),
    "Zero-init": (81.74, 84.43, 56.75, 74.32, 71.80),
}


@pytest.mark.parametrize("method", PRINTED)
def test_the_papers_means_follow_from_its_rows(method: str) -> None:
    summary = summarise(paper_results()[method])
    natural, specialized, structured, of_groups, of_tasks = PRINTED[method]
    found = (*summary.groups.values(), summary.mean_of_groups, summary.mean_of_tasks)
    assert list(summary.groups) == ["Natural", "Specialized", "Structured"]
    # Rows are rounded to 0.1, so a mean of them is off by at most 0.05; the figures printed are rounded once more.
    for value, printed in zip(found, (natural, specialized, structured, of_groups, of_tasks), strict=True):
        assert value == pytest.approx(printed, abs=0.05 + (0.05 if method == "Bias" else 0.005))
    assert not summary.partial
    assert list(summary.to_dict())[-2:] == ["mean of 3 group means", "mean of 19 tasks"]


def test_partial_results_say_so() -> None:
    summary = summarise({"cifar": 0.5, "dtd": 0.7, "kitti": 0.8})
    assert summary.groups == {"Natural": pytest.approx(0.6), "Structured": pytest.approx(0.8)}
    assert summary.mean_of_groups is None
    assert summary.mean_of_tasks == pytest.approx(2.0 / 3)
    assert summary.partial
    assert len(summary.missing) == 16
    assert "svhn" in summary.missing
    assert "mean of 3 tasks (partial)" in summary.to_dict()
    assert summary.to_dict()["missing"] == list(summary.missing)
    with pytest.raises(DataError, match=r"'cifar10' is no task of VTAB-1k\. Did you mean 'cifar'"):
        summarise({"cifar10": 0.5})
    with pytest.raises(DataError, match="no result"):
        summarise({})


def facts(start: str, end: str) -> list[list[str]]:
    """The rows of the tables between two texts of the fact sheet."""
    text = (SHARED / "reference" / "paper-facts.md").read_text(encoding="utf-8")
    part = text.split(start)[1].split(end)[0]
    return [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in part.splitlines() if row[:1] == "|"]


@pytest.mark.skipif(not (SHARED / "reference").is_dir(), reason="needs the fact sheet in ../shared/reference")
def test_the_tables_are_those_of_the_fact_sheet() -> None:
    groups = facts("#### 6.1.1", "#### 6.1.2")[2:]
    assert [(row[1], row[0], int(row[2])) for row in groups] == [
        (name, known.group, known.classes) for name, known in VTAB_TASKS.items()
    ]
    for row, known in zip(groups, VTAB_TASKS.values(), strict=True):
        assert f"{known.test_images:,}" in row[3]
    rows: dict[str, list[float]] = {name: [] for name in paper_results()}
    for row in facts("\nNatural:", "Zero-init beats VPT"):
        if row[0] in rows:
            rows[row[0]] += map(float, row[1:-1])  # the last cell is the group's mean
    assert rows == {method: list(results.values()) for method, results in paper_results().items()}
    assert rows.keys() == PRINTED.keys()


def test_presets_are_complete_and_the_grid_is_vpts() -> None:
    names = [name for name in list_presets() if name.startswith("vtab/")]
    assert names == ["vtab/demo", "vtab/fact", "vtab/vpt"]
    for name in names:
        preset = read_preset(name)
        assert preset.pop("description")
        config = RunConfig.from_dict(preset)
        assert isinstance(config.options, VTABConfig)
        assert RunConfig.from_dict(config.to_dict()) == config
    assert vpt_grid()["base_rate"] == [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
    assert vpt_grid()["weight_decay"] == [0.01, 0.001, 0.0001, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"split": "val"}, "split must be one of 'train800val200', 'train800'"),
        ({"on_bad": "ignore"}, "on_bad must be one of"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"image_size": 0}, "image_size must be a whole number"),
        ({"drop_path": 1.0}, "drop_path must be a rate"),
        ({"fields": ("image",)}, "fields must name the columns"),
        ({"dataset": 3}, "dataset must be text"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        VTABConfig.from_dict(settings)
