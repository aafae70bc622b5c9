"""Several models in one task: each is loaded, placed, frozen, recorded and checked in one way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import zinit
from tests.contract.several import Seeing
from tests.tasks.vit import save_tiny, tiny
from tests.tiny import save_records, save_tiny_llama
from zinit.errors import BackboneError, CheckpointError, ConfigError
from zinit.models.identity import difference, identify
from zinit.models.timm import load_timm
from zinit.runs.build import build_model, build_task, load_run
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import override, resolve
from zinit.runs.train import train_run
from zinit.tasks.base import LoadedModel, Task, TaskInputs
from zinit.train.strategy import place

QUICK = ("train.steps=2", "train.warmup_steps=0", "train.evaluate_every=0", "train.save_every=1", "prefix.length=2")


@pytest.fixture(autouse=True)
def registered() -> None:
    zinit.register_task("seeing", "tests.contract.several:Seeing")


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Makes a run's settings; the vision tower is in the folder ``eye``."""
    save_tiny(tmp_path / "eye")
    model, data = save_tiny_llama(tmp_path / "model"), save_records(tmp_path / "data.json", 30)

    def make(*options: str) -> Any:
        given = {"task": "seeing", "model": str(model), "data": str(data)}
        where = f"task.encoder={tmp_path / 'eye'}"
        limits = ("task.evaluation_limit=1", "task.max_new_tokens=2")
        return resolve(backbone="llama", **given, options=[where, *limits, *QUICK, *options])[0]

    return make


def built(config: Any) -> Task:
    return build_task(config, build_model(config, torch.device("cpu")))


def another(folder: Path, **changes: Any) -> None:
    """Puts other weights of the same, or another, architecture into a folder of timm's."""
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    state = tiny(**changes).state_dict()
    save_file({name: tensor + 0.05 for name, tensor in state.items()}, folder / "model.safetensors")


def test_it_is_a_frozen_part_of_the_task_in_evaluation_mode(settings: Any, tmp_path: Path) -> None:
    task: Any = built(settings())
    expected, _ = load_timm(tmp_path / "eye", dtype=torch.float32)
    found = dict(task.named_parameters())
    assert {name for name in found if name.startswith("vision.")} == {
        f"vision.{n}" for n, _ in expected.named_parameters()
    }
    assert all(torch.equal(found[f"vision.{name}"], value) for name, value in expected.named_parameters())
    assert not any(parameter.requires_grad for parameter in task.vision.parameters())
    task.train()
    assert (task.training, task.model.training, task.vision.training) == (True, True, False)
    assert set(task.trained()) == {"project.weight", "project.bias"}
    place(task, Accelerator())
    assert {parameter.device for parameter in task.parameters()} == {Accelerator().device}


def test_a_method_may_train_it(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from zinit.methods.prefix import ZeroInit

    apply = ZeroInit.apply

    def unfreeze(self: Any, model: nn.Module, context: Any) -> Any:
        context.models["vision"].requires_grad_(True)
        return apply(self, model, context)

    monkeypatch.setattr(ZeroInit, "apply", unfreeze)
    task: Any = built(settings())
    assert {"vision.norm.weight", "project.weight"} <= set(task.trained())
    assert task.train().vision.training


LOADED: list[dict[str, Any]] = []


def load_and_note(source: str, **loading: Any) -> Any:
    LOADED.append(loading)
    return load_timm(source, **{**loading, "quantize": None})


def load_plainly(source: str, *, dtype: torch.dtype, revision: str | None) -> Any:
    return load_timm(source, dtype=dtype, revision=revision)


def test_dtype_device_and_quantisation_are_those_of_the_run(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    LOADED.clear()
    monkeypatch.setattr(
        "zinit.runs.build.load_host", lambda task, source, *, trains, quantize, **how: task.load_model(source, **how)
    )
    note = "task.loader=tests.contract.test_several_models:load_and_note"
    task: Any = built(settings("dtype=bfloat16", "quantize=torchao-int8", note))
    assert {parameter.dtype for parameter in task.vision.parameters()} == {torch.bfloat16}
    assert [
        {"dtype": torch.bfloat16, "device": torch.device("cpu"), "quantize": "torchao-int8", "revision": None}
    ] == LOADED
    plain = "task.loader=tests.contract.test_several_models:load_plainly"
    assert built(settings(plain)).name == "seeing"
    with pytest.raises(ConfigError, match=r"the task's model 'vision' cannot quantise .* load_plainly takes no"):
        built(settings(plain, "quantize=torchao-int8"))


def test_what_cannot_be_loaded_is_named(settings: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "eye")
    with pytest.raises(BackboneError, match="the task's model 'vision': "):
        built(settings())


@pytest.mark.parametrize("name", ["model", "collate", "not a name"])
def test_a_name_that_is_taken_is_refused(name: str, settings: Any) -> None:
    config = settings()
    extra = LoadedModel(model=nn.Linear(1, 1), processor=None)
    with pytest.raises(ConfigError, match=f"the task 'seeing' cannot call a model '{name}'"):
        Seeing(TaskInputs(model=nn.Linear(1, 1), models={name: extra}), config.options)


def test_a_run_records_it_and_keeps_none_of_its_weights(settings: Any, tmp_path: Path) -> None:
    train_run(settings(), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["models"]
    model, _ = load_timm(tmp_path / "eye", dtype=torch.float32)
    assert recorded == {"vision": identify(model)}
    assert recorded["vision"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    files = sorted((tmp_path / "run").rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert tensors.keys()
            assert not [name for name in tensors.keys() if "vision" in name]  # noqa: SIM118
    evaluated = evaluate_run(tmp_path / "run")
    assert set(evaluated["metrics"]) == {"base", "adapted"}
    assert load_run(tmp_path / "run", torch.device("cpu"))[0].task == "seeing"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({}, r"weights: \S+ begins"), ({"depth": 2}, "parameters is"), ({"embed_dim": 16}, "parameters")],
)
def test_another_model_is_refused_by_name_and_field(
    changes: dict[str, Any], field: str, settings: Any, tmp_path: Path
) -> None:
    config = settings()
    train_run(config, tmp_path / "run")
    another(tmp_path / "eye", **changes)
    expected = rf"another model 'vision': {field}.*Restore the model"
    with pytest.raises(CheckpointError, match=expected):
        evaluate_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=expected):
        load_run(tmp_path / "run", torch.device("cpu"))
    with pytest.raises(CheckpointError, match=expected):
        train_run(config, tmp_path / "run", resume=True)


def test_where_it_is_may_change(settings: Any, tmp_path: Path) -> None:
    config = settings()
    first = train_run(config, tmp_path / "run")
    (tmp_path / "eye").rename(tmp_path / "moved")
    moved = override(config, options=[f"task.encoder={tmp_path / 'moved'}"])
    again = train_run(moved, tmp_path / "run", resume=True)
    assert again["metrics"] == first["metrics"]


def test_a_run_from_before_without_the_model_is_refused(settings: Any, tmp_path: Path) -> None:
    train_run(settings(), tmp_path / "run")
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    del document["models"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="only the task now has a model 'vision'"):
        evaluate_run(tmp_path / "run")


def test_the_fingerprint_knows_weights_in_another_dtype() -> None:
    model = tiny()
    found = identify(model)
    assert json.loads(json.dumps(found)) == found
    assert difference(found, identify(tiny().bfloat16())) is None
    assert difference(found, identify(tiny().half())) is None
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight *= 1.05
    assert "blocks.1.mlp.fc1.weight begins" in (difference(found, identify(model)) or "")
    assert difference(found, {**found, "type": "other"}) == f"type is 'other', expected {found['type']!r}"
    assert identify(tiny().to("meta"))["weights"] == {}
