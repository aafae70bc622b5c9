"""VTAB-1k: the frozen baseline beside the result, in training and in later evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from tests.tasks.vit import make_image, save_tiny, save_vtab, task
from zinit.cli import main
from zinit.config import PrefixConfig
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.train import train_run
from zinit.tasks._linear_probe import solve_head
from zinit.tasks.vtab.task import VTABConfig
from zinit.train.config import TrainConfig
from zinit.train.held_out import held_out_loss
from zinit.train.strategy import make_accelerator


def test_the_frozen_baseline_is_scikit_learns(tmp_path: Path) -> None:
    """The same accuracy and loss as scikit-learn's own, and the head is as before afterwards."""
    for settings in ({}, {"head_init": "logistic-regression", "head_C": 1.0}):
        root = save_vtab(tmp_path / str(len(settings)), train=24, val=6, test=30)
        found = task(root, **settings)
        before = {name: tensor.clone() for name, tensor in found.head.state_dict().items()}
        train, held_out = found.features(found.train_stream).numpy(), found.features(found.held_out_stream).numpy()
        solver = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, found.train_labels)
        labels = [found._number[example.label] for example in found.held_out_examples]
        accelerator = make_accelerator(TrainConfig())
        with found.frozen_baseline():
            loss, _ = held_out_loss(found, TrainConfig(), accelerator)
            assert found.evaluate(accelerator).metrics["accuracy"] == pytest.approx(solver.score(held_out, labels))
        assert loss == pytest.approx(log_loss(labels, solver.predict_proba(held_out), labels=solver.classes_), rel=1e-3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in found.head.state_dict().items())
        found.prepare()
        prepared, _ = held_out_loss(found, TrainConfig(), accelerator)
        assert (prepared == pytest.approx(loss)) == bool(settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on images that are hard to tell apart. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(
        backbone="vit",
        task="vtab",
        model=str(save_tiny(folder / "model")),
        data=str(save_vtab(folder / "data", classes=6, train=48, val=12, test=24)),
        prefix=PrefixConfig(length=4, init_std=0.1),
        train=TrainConfig(steps=10, batch_size=20, learning_rate=2e-2, warmup_steps=2, save_every=0),
        options=VTABConfig(normalisation="imagenet"),
    )
    train_run(config, folder / "run")
    return folder / "run"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Other images of the same classes, darker ones."""
    for label in range(6):
        (tmp_path / "other" / str(label)).mkdir(parents=True)
        for i in range(5):
            make_image(label, 50 + i).point(lambda value: value * 3 // 4).save(
                tmp_path / "other" / str(label) / f"{i}.png"
            )
    return tmp_path / "other"


def test_other_data_meet_the_same_baseline(run: Path, other: Path) -> None:
    trained, seen = task(run.parent / "data"), task(other)
    solver = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    solver.fit(trained.features(trained.train_stream).numpy(), trained.train_labels)
    features = [seen.features(stream) for stream in (seen.train_stream, seen.held_out_stream)]
    labels = [int(e.label) for e in (*seen.train_examples, *seen.held_out_examples)]
    expected = solver.score(torch.cat(features).numpy(), labels)
    untrained = task(run.parent / "data", train=False, labels=[str(i) for i in range(6)], held_out_data=str(other))
    found = evaluate_run(run, data=str(other))
    assert found["metrics"]["base"]["accuracy"] == pytest.approx(expected)
    assert (
        found["metrics"]["base"]["accuracy"] != untrained.evaluate(make_accelerator(TrainConfig())).metrics["accuracy"]
    )
    assert found["baseline"] == "logistic regression on the frozen model's features"
    assert evaluate_run(run)["metrics"]["base"]["accuracy"] != found["metrics"]["base"]["accuracy"]


def test_a_baseline_that_was_not_kept_is_left_out(
    run: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluate_run(run)["metrics"]
    old = tmp_path / "old"
    old.mkdir()
    for file in run.iterdir():
        if file.is_file() and file.name != "baseline.safetensors":
            (old / file.name).write_bytes(file.read_bytes())
    assert evaluate_run(old)["metrics"] == whole  # the training images are read: the baseline is made anew
    found = evaluate_run(old, data=str(other))
    assert list(found["metrics"]) == ["adapted"]
    assert found["metrics"]["adapted"] == evaluate_run(run, data=str(other))["metrics"]["adapted"]
    monkeypatch.setattr("sys.argv", ["zinit", "eval", str(old), "--data", str(other)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "base: left out, as the run has not kept what it takes" in capsys.readouterr().out


def test_features_are_taken_in_evaluation_mode(tmp_path: Path) -> None:
    found = task(save_vtab(tmp_path / "kitti"), drop_path=0.9)
    found.train()
    first = found.features(found.train_stream)
    found.train()
    assert torch.equal(found.features(found.train_stream), first)
    found.eval()
    with torch.no_grad():
        images = found.collate(found.train_stream, range(len(found.train_stream)))["images"]
        torch.testing.assert_close(found._pooled(images), first)


@pytest.mark.parametrize("present", [(0, 2), (1,), (0, 1, 3)])
def test_a_class_without_training_images_is_never_predicted(present: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [present[i % len(present)] for i in range(30)]
    features = torch.randn(30, 5, generator=generator) + torch.tensor(labels)[:, None]
    head = nn.Linear(5, 4)
    solve_head(head, features, labels)
    far = 100 * torch.randn(500, 5, generator=generator)
    assert set(head(far).argmax(dim=1).tolist()) <= set(present)
