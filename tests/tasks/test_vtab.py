"""VTAB-1k: preprocessing, head, loss, evaluation, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import zinit
from tests.tasks.vit import (
    SHAPE,
    balanced,
    make_image,
    save_classes,
    save_tiny,
    save_vtab,
    task,
    task_pixels,
    tiny,
)
from zinit.config import PrefixConfig
from zinit.errors import ConfigError, DataError
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.train import train_run
from zinit.tasks.base import TaskInputs
from zinit.tasks.vtab.task import VTAB, VTABConfig
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Step


class Recorder(nn.Module):
    """Stands for a backbone, and keeps what it was given."""

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
    found = VTAB(TaskInputs(model=model, processor=processor, data=str(root)), config)
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
    assert all(sample["image"].startswith("data:image/jpeg;base64,") for sample in evaluation.samples)
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
    assert {index for share in shares for index, _ in share} == set(range(67))
    assert [len(share) for share in shares] == [
        23,
        23,
        23,
    ]  # as many each, for a sharded model's sake


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
    make_image(2, 77).save(root / "images" / "test" / "000005.png")
    assert task(root).fingerprint() != before


def test_another_size_resamples_the_positions(tmp_path: Path) -> None:
    root, model = save_vtab(tmp_path / "kitti"), tiny()
    handle = zinit.attach(model, PrefixConfig(length=3), seed=0)
    found = VTAB(TaskInputs(model=model, handle=handle, data=str(root)), VTABConfig(image_size=24))
    assert found.collate(found.train_stream, [0])["images"].shape == (1, 3, 24, 24)
    assert list(model.pos_embed.shape) == [1, 1 + 36, 32]
    assert not model.pos_embed.requires_grad
    assert found(found.collate(found.train_stream, [0, 1])).isfinite()
    assert found.train_stream.lengths[0] == 36
    with pytest.raises(ConfigError, match="a multiple of the patch's 4 pixels; got 18"):
        task(root, image_size=18)
    with pytest.raises(ConfigError, match="Recorder cannot change its image's size"):
        task(root, Recorder(), image_size=24)


def test_without_drop_path_the_models_own_is_off(tmp_path: Path) -> None:
    model = VisionTransformer(**SHAPE, num_classes=0, drop_path_rate=0.3)
    found = task(save_vtab(tmp_path), model)
    assert not [name for name, part in found.model.named_modules() if isinstance(part, DropPath)]


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
    frozen, adapted = results["metrics"]["base"], results["metrics"]["adapted"]
    assert adapted["accuracy"] >= 0.9
    assert frozen["accuracy"] == 1.0  # the baseline is a logistic regression, which such colours are easy for
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


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    root, model = save_vtab(tmp_path / "data", train=24, val=6, test=6), save_tiny(tmp_path / "model")
    losses = {}
    for checkpointing in (False, True):
        train = TrainConfig(steps=4, batch_size=10, learning_rate=0.05, warmup_steps=0, save_every=0,
                            gradient_checkpointing=checkpointing)  # fmt: skip
        config = RunConfig(
            backbone="vit", task="vtab", model=str(model), data=str(root), train=train, options=VTABConfig()
        )
        events: list[Event] = []
        train_run(config, tmp_path / f"run{checkpointing}", on_event=events.append)
        losses[checkpointing] = [event.loss for event in events if isinstance(event, Step)]
    assert len(set(losses[True])) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
