"""Stored outputs of the frozen lower blocks: the same bits as without, and found again."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.tasks.vit import save_tiny, tiny
from tests.train.frozen_blocks import DEPTH, TRAIN, TRIED, assert_same_bits, base_to_novel, trained, vtab
from tests.train.test_crash import steps
from zinit.errors import ConfigError
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks.vtab.task import VTAB
from zinit.train import activation_cache, tensor_store
from zinit.train.config import TrainConfig
from zinit.train.events import Event, Step
from zinit.train.loop import Interrupted, ignore

# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"micro_batch_size": 4},
        {"batch_size": 6, "micro_batch_size": 3},
        {"gradient_checkpointing": True},
        {"workers": 1},
        {"evaluate_every": 2},
        {"mixed_precision": "bf16"},
    ],
    ids=lambda settings: next(f"{name}={value}" for name, value in reversed(settings.items())),
)
def test_the_same_bits_as_without(settings: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    plain = trained(vtab(pictures), **settings)
    stored = trained(vtab(pictures), tmp_path, **settings)
    assert_same_bits(stored, plain)
    assert len(set(plain.losses)) == len(plain.losses)  # it does train
    held_out = sum(plain.calls) - 3 * TRAIN  # these pass through the whole host
    assert (held_out > 0) == ("evaluate_every" in settings)
    assert sum(stored.calls) == TRAIN + 5 + held_out  # each once, and those that it was tried on


def test_uneven_batches_differ_by_rounding(classes: Path, tmp_path: Path) -> None:
    """A matrix product may round its rows otherwise where it has more of them, with and without stored states."""
    plain = trained(base_to_novel(classes, {}, views=3), batch_size=5, micro_batch_size=2)
    for size in (1, 2, 5):  # the first fills
        stored = trained(base_to_novel(classes, {}, views=3), tmp_path, batch_size=5, micro_batch_size=size)
        assert stored.losses == pytest.approx(plain.losses, rel=1e-5)
        for name, value in plain.weights.items():
            torch.testing.assert_close(stored.weights[name], value, rtol=1e-5, atol=1e-5)
    assert len(stored.folders) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hosts_of_half_precision(dtype: torch.dtype, pictures: Path, tmp_path: Path) -> None:
    plain, stored = (trained(vtab(pictures, model=tiny(depth=DEPTH).to(dtype)), cache) for cache in (None, tmp_path))
    assert_same_bits(stored, plain)
    assert tensor_store._read(next(stored.folders[0].iterdir()))[0].dtype == dtype


def test_layers_that_are_not_neighbours(pictures: Path, tmp_path: Path) -> None:
    plain, stored = (trained(vtab(pictures, layers=(1, 3)), cache) for cache in (None, tmp_path))
    assert_same_bits(stored, plain)
    assert sum(stored.calls) == TRAIN + 5


def test_blocks_that_give_tuples(pictures: Path, tmp_path: Path) -> None:
    """As layers of transformers did: ``hidden, None = block(hidden)``."""

    class Paired(nn.Module):
        def __init__(self, number: int, block: nn.Module) -> None:
            super().__init__()
            self.number, self.block = number, block

        def forward(self, x: Any) -> tuple[Tensor, None]:
            return self.block(x[0] if self.number else x), None

    class First(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: tuple[Tensor, None]) -> Tensor:
            return self.norm(x[0])

    def paired() -> Any:
        model = tiny(depth=DEPTH)
        model.blocks = nn.Sequential(*(Paired(*each) for each in enumerate(model.blocks)))
        model.norm = First(model.norm)
        return model

    found = []
    for cache in (None, tmp_path):
        task = vtab(pictures, model=paired())
        found.append(trained(task, cache, lowest=task.model.blocks[0].block.norm1))
    plain, stored = found
    assert_same_bits(stored, plain)
    assert sum(stored.calls) == TRAIN + 5


def test_dropout_above_draws_the_same(pictures: Path, tmp_path: Path) -> None:
    found = []
    for cache in (None, tmp_path, tmp_path):
        model = tiny(depth=DEPTH)
        model.blocks[3].mlp.drop1.p = 0.5
        torch.manual_seed(7)
        found.append(trained(vtab(pictures, model=model), cache))
    plain, filling, reading = found
    assert_same_bits(filling, plain)
    assert_same_bits(reading, plain)


def test_only_batches_that_carry_states_skip(pictures: Path, tmp_path: Path) -> None:
    task = vtab(pictures)
    batch = task.collate(task.train_stream, [0, 1])
    with torch.no_grad():
        expected, features = task(batch), task.model(batch["images"].float())
        config = TrainConfig(activation_cache=str(tmp_path))
        with activation_cache.stored_activations(task, config, Accelerator(cpu=True), ignore) as collate:

            def stored(indices: list[int]) -> Tensor:
                return collate(task.train_stream, indices)[activation_cache.KEY]

            other = task({**batch, activation_cache.KEY: stored([2, 3])})
            assert torch.equal(task.model(batch["images"].float()), features)  # past the task
            assert torch.equal(task(batch), expected)
            assert torch.equal(task({**batch, activation_cache.KEY: stored([0, 1])}), expected)
            assert not torch.equal(other, expected)


def test_the_host_is_left_as_it_was(pictures: Path, tmp_path: Path) -> None:
    task = vtab(pictures)
    batch = task.collate(task.train_stream, [0, 1])
    trained(task, tmp_path)
    assert not any("forward" in vars(block) for block in task.model.blocks)
    assert not task._forward_pre_hooks
    assert not task._forward_hooks
    fresh = vtab(pictures)
    fresh.load_state_dict(task.state_dict())
    assert torch.equal(task.eval()(batch), fresh.eval()(batch))


# --- found again ------------------------------------------------------------------------------------------------------


def test_another_rate_seed_and_prefix_fill_nothing(pictures: Path, tmp_path: Path) -> None:
    first = trained(vtab(pictures), tmp_path)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    for task, settings in (
        (vtab(pictures), {"learning_rate": 0.01}),
        (vtab(pictures, seed=5, length=7), {"batch_size": 6, "micro_batch_size": 3}),
    ):
        again = trained(task, tmp_path, **settings)
        assert again.folders == first.folders
        assert len(again.calls) == TRIED
        assert again.losses != first.losses
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == written


def changed(where: str) -> Any:
    """The smallest change of one weight."""
    model = tiny(depth=DEPTH)
    with torch.no_grad():
        weight = model.get_parameter(where)
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    return model


def bigger_eps() -> Any:
    model = tiny(depth=DEPTH)
    model.blocks[0].norm1.eps *= 8
    return model


@pytest.mark.parametrize(
    ("make", "same"),
    [
        pytest.param(lambda data: vtab(data, layers=1), False, id="layers"),
        pytest.param(lambda data: vtab(data, model=tiny(depth=DEPTH).bfloat16()), False, id="dtype"),
        pytest.param(lambda data: vtab(data, model=changed("blocks.1.mlp.fc2.weight")), False, id="frozen blocks"),
        pytest.param(lambda data: vtab(data, model=changed("pos_embed")), False, id="embedding"),
        pytest.param(lambda data: vtab(data, model=bigger_eps()), False, id="constant"),
        pytest.param(lambda data: vtab(data, normalisation="none"), False, id="normalisation"),
        pytest.param(lambda data: vtab(data, interpolation="bilinear"), False, id="pixels"),
        pytest.param(lambda data: vtab(data, split="train800"), False, id="examples"),
        pytest.param(lambda data: vtab(data, model=changed("blocks.2.mlp.fc2.weight")), True, id="above"),
        pytest.param(lambda data: vtab(data, length=1, seed=9), True, id="prefix"),
    ],
)
def test_what_has_a_folder_of_its_own(make: Callable[[Path], VTAB], same: bool, pictures: Path, tmp_path: Path) -> None:
    first = trained(vtab(pictures), tmp_path, steps=2)
    assert len(first.folders) == 1
    other = make(pictures)
    assert len(trained(other, tmp_path, steps=2).folders) == (1 if same else 2)


def test_one_other_picture_in_the_middle_has_a_folder_of_its_own(pictures: Path, tmp_path: Path) -> None:
    """Only the first and the last are tried on."""
    copy = shutil.copytree(pictures, tmp_path / "copy")
    shutil.copy(copy / "images" / "train800" / "000001.png", copy / "images" / "train800" / "000004.png")
    cache = tmp_path / "cache"
    assert len(trained(vtab(pictures), cache, steps=2).folders) == 1
    assert len(trained(vtab(copy), cache, steps=2).folders) == 2


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ({"towers": ("vision_model",)}, {}),
        ({}, {}),  # both towers
        ({}, {"views": 3}),
        ({"towers": ("vision_model",)}, {"gradient_checkpointing": True}),
    ],
    ids=["vision", "both", "views", "checkpointing"],
)
def test_clip(prefix: dict[str, Any], settings: dict[str, Any], classes: Path, tmp_path: Path) -> None:
    options = {name: settings[name] for name in settings if name != "views"}
    settings = {name: settings[name] for name in settings if name == "views"}
    found = []
    for cache in (None, tmp_path, tmp_path):
        task = base_to_novel(classes, prefix, **settings)
        found.append(trained(task, cache, **options))
    plain, filling, reading = found
    assert_same_bits(filling, plain)
    assert_same_bits(reading, plain)
    count = len(task.train_stream)
    assert count == 4 * settings.get("views", 1)
    assert (sum(plain.calls), sum(filling.calls), sum(reading.calls)) == (3 * count, count + 5, 5)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({"towers": ("text_model",)}, "0 of 1 towers"),  # its features of the pictures are kept in memory
        ({"layers": 2}, "the lowest layer is adapted"),
    ],
)
def test_clip_refused(prefix: dict[str, Any], message: str, classes: Path, tmp_path: Path) -> None:
    task = base_to_novel(classes, prefix)
    with pytest.raises(ConfigError, match=message):
        trained(task, tmp_path)


# --- whole runs -------------------------------------------------------------------------------------------------------

OPTIONS = ["prefix.layers=1", "prefix.length=3", "prefix.gate_init=0.3", "steps=6", "batch_size=5", "save_every=2",
           "micro_batch_size=2", "evaluate_every=3", "warmup_steps=1", "learning_rate=0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, str]:
    return {"model": str(save_tiny(tmp_path_factory.mktemp("model"))), "data": str(pictures)}


@pytest.fixture(scope="module")
def plain_run(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    train_run(resolve(backbone="vit", options=OPTIONS, **inputs)[0], output)
    return output


def test_a_resumed_run_may_begin_and_end_to_use_it(
    inputs: dict[str, str], plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    without, _ = resolve(backbone="vit", options=OPTIONS, **inputs)
    using, _ = resolve(backbone="vit", options=[*OPTIONS, "train.activation_cache=cache"], **inputs)
    assert using.train.activation_cache == str(tmp_path / "cache")  # the same from any folder
    for name, first, then in (("begins", without, using), ("ends", using, without)):
        with pytest.raises(Interrupted):
            train_run(first, tmp_path / name, on_event=stop)
        train_run(then, tmp_path / name, resume=True)
        assert steps(tmp_path / name) == steps(plain_run)
        found, expected = (json.loads((run / "metrics.json").read_text()) for run in (tmp_path / name, plain_run))
        assert found["metrics"] == expected["metrics"]


def test_what_cannot_be_used_is_said_before_a_run_begins(inputs: dict[str, str], tmp_path: Path) -> None:
    config, _ = resolve(
        backbone="vit", options=["prefix.layers=none", f"train.activation_cache={tmp_path / 'c'}"], **inputs
    )
    told: list[str] = []
    with pytest.raises(ConfigError, match="the lowest layer is adapted"):
        train_run(config, tmp_path / "run", on_event=lambda event: told.append(event.kind))
    assert "eval" not in told
    assert not (tmp_path / "run").exists()
