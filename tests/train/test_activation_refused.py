"""Where the outputs of the lower blocks may not be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from tests.tasks.vit import tiny
from tests.tiny import save_records, save_tiny_llama
from tests.train.frozen_blocks import DEPTH, trained, vtab
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.models.quantization import quantize_in_place
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.tasks.base import TaskInputs
from zinit.tasks.vtab.task import VTAB, VTABConfig
from zinit.train import activation_cache
from zinit.train.config import TrainConfig


def with_batch_norm() -> Any:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    model = tiny(depth=DEPTH)
    model.norm_pre = Norm()
    return model


def with_shortcut() -> Any:
    """What the lowest block gives is added to what the topmost gives."""
    model, kept = tiny(depth=DEPTH), []
    model.blocks[0].register_forward_hook(lambda block, args, output: kept.append(output))
    model.norm.register_forward_pre_hook(lambda norm, args: (args[0] + 1e-3 * kept.pop(),))
    return model


def shared_blocks() -> Any:
    """The second block runs twice."""
    model = tiny(depth=DEPTH)
    model.norm_pre.register_forward_hook(lambda norm, args, output: model.blocks[1](output))
    return model


def rarely_dropping() -> Any:
    model = tiny(depth=DEPTH)
    model.blocks[1].attn.attn_drop.p = 1e-9  # no draw would show it
    return model


def trained_embedding(task: VTAB) -> None:
    task.model.patch_embed.proj.bias.requires_grad_(True)


def no_handle(task: VTAB) -> None:
    task.handle = None


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        pytest.param({"layers": None}, {}, "the lowest layer is adapted.*prefix.layers=L", id="all-layers"),
        pytest.param({"layers": DEPTH}, {}, "the lowest layer is adapted", id="as-many-layers"),
        pytest.param({"drop_path": 0.2}, {}, "draw random numbers in training", id="drop-path"),
        pytest.param({"model": rarely_dropping}, {}, "draw random numbers", id="attention-dropout"),
        pytest.param(
            {"model": lambda: tiny(depth=DEPTH, pos_drop_rate=0.1)}, {}, "draw random", id="embedding-dropout"
        ),
        pytest.param({"model": with_batch_norm}, {}, "something else in training", id="batch-norm"),
        pytest.param({"model": with_shortcut}, {}, "gives another loss: it uses them elsewhere", id="shortcut"),
        pytest.param({"model": shared_blocks}, {}, "0 of 1 towers", id="called-twice"),
        pytest.param({"then": trained_embedding}, {}, "below the lowest adapted block is trained", id="trained"),
        pytest.param({"then": no_handle}, {}, "the method adds nothing to the topmost layers", id="no-prefix"),
        pytest.param({}, {"compile": True}, "train.compile=false", id="compile"),
    ],
)
def test_refused(
    settings: dict[str, Any], options: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    settings = dict(settings)
    then = settings.pop("then", lambda task: None)
    if "model" in settings:
        settings["model"] = settings["model"]()
    task = vtab(pictures, **settings)
    then(task)
    with pytest.raises(ConfigError, match=rf"train\.activation_cache cannot be used: .*{message}"):
        trained(task, tmp_path, **options)
    assert not [*tmp_path.iterdir()]


def test_sharded_hosts_are_refused(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache, "is_sharded", lambda accelerator: True)
    with pytest.raises(ConfigError, match=r"sharded host.*plain data parallelism"):
        trained(vtab(pictures), tmp_path)


def test_quantised_hosts_are_refused(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = tiny(depth=DEPTH)
    quantize_in_place(model, "torchao-int8", "cpu")
    with pytest.raises(ConfigError, match=r"quantised host.*Set quantize=none"):
        trained(vtab(pictures, model=model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_texts_of_uneven_length_are_refused(tmp_path: Path) -> None:
    inputs = {"model": str(save_tiny_llama(tmp_path / "model")), "data": str(save_records(tmp_path / "data.json"))}
    options = ["prefix.layers=1", f"train.activation_cache={tmp_path / 'cache'}", "task.evaluation_limit=0"]
    config, _ = resolve(backbone="llama", options=options, **inputs)
    with pytest.raises(ConfigError, match=r"the examples differ in length, from \d+ to \d+"):
        train_run(config, tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "head-only", "lora"])
def test_methods_without_a_prefix_are_refused(method: str, pictures: Path, tmp_path: Path) -> None:
    found = METHODS.get(method)
    adapted = found(found.Config()).apply(
        tiny(depth=DEPTH), ApplyContext(prefix=PrefixConfig(), backbone="vit", seed=0)
    )
    task = VTAB(TaskInputs(model=adapted.model, handle=adapted.handle, data=str(pictures)), VTABConfig())
    with pytest.raises(ConfigError, match="Use one with a prefix"):
        trained(task, tmp_path, lowest=task.head)


@pytest.mark.parametrize("value", ["", 3, True])
def test_the_setting_is_a_folder(value: Any) -> None:
    with pytest.raises(ConfigError, match="activation_cache must be a folder, or none"):
        TrainConfig(activation_cache=value)
