"""Runs with images: every method that takes them trains, resumes to the same bits, and evaluates as it did."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny_llama
from zinit.demo import clip_path, vit_path
from zinit.encoders.cache import FeatureCache
from zinit.errors import CheckpointError, ConfigError
from zinit.methods import METHODS
from zinit.runs.config import RunConfig
from zinit.runs.evaluate import evaluate_run
from zinit.runs.settings import resolve
from zinit.runs.train import Interrupted, train_run
from zinit.train.events import Event, Notice, Step

pytestmark = pytest.mark.usefixtures("flags_task")

WITH_IMAGES = sorted(name for name in METHODS if "context" in METHODS.fact(name, "defaults"))
SMALL = {"visual-tokens": ("context.hidden=8", "context.blocks=1", "context.heads=2")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def configured(model: Path, method: str, cache: Path, *more: str, encoder: Path | None = None) -> RunConfig:
    source = METHODS.fact(method, "defaults")["context"]["name"]
    options = ["steps=4", "batch_size=6", "micro_batch_size=4", "learning_rate=0.02", "warmup_steps=0", "save_every=2",
               "task.evaluation_limit=4", "max_new_tokens=4", "evaluate_every=0", f"encoder.cache={cache}"]  # fmt: skip
    options += [*SMALL.get(source, ()), *more]
    where = str(encoder or vit_path())
    given: dict[str, Any] = {"model": str(model), "data": "none", "encoder": where, "options": options}
    return resolve(backbone="llama", task="flags", method=method, **given)[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


@pytest.mark.parametrize("method", WITH_IMAGES)
def test_trained_resumed_and_evaluated(
    method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(model, method, tmp_path / "cache")
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    notes: list[str] = []
    results = train_run(
        config, tmp_path / "whole", on_event=lambda e: notes.append(e.text) if isinstance(e, Notice) else None
    )
    assert set(results["metrics"]) == {"base", "adapted", "shuffled"}
    assert len({figures["loss"] for figures in results["metrics"].values()}) == 3
    assert results["counts"]["train_with_image"] == 8
    assert any(note.startswith("features of ") for note in notes)
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["models"]["encoder"]["parameters"] > 0
    assert sum(x.numel() for x in weights(tmp_path / "whole").values()) == results["num_trainable"]
    assert (tmp_path / "whole" / "source.safetensors").is_file()

    def stop(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    def never(*arguments: Any) -> None:
        raise AssertionError("an image was encoded again")

    monkeypatch.setattr(FeatureCache, "_encode", never)
    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "stopped", on_event=stop)
    train_run(config, tmp_path / "stopped", resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert evaluate_run(tmp_path / "whole")["metrics"] == results["metrics"]


def test_the_same_encoder_and_no_other(model: Path, tmp_path: Path) -> None:
    config = configured(model, "v1-multimodal", tmp_path / "cache")

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_run(config, tmp_path / "run", on_event=stop)
    other = configured(model, "v1-multimodal", tmp_path / "cache", encoder=clip_path())
    with pytest.raises((CheckpointError, ConfigError), match="encoder"):
        train_run(other, tmp_path / "run", resume=True)


def test_what_does_not_go_together_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing takes the features of the encoder .*--method v1-multimodal"):
        resolve(backbone="llama", encoder=str(clip_path()))
    config = resolve(backbone="llama", task="flags", method="v2", model=str(model), data="none")[0]
    with pytest.raises(ConfigError, match=r"needs a model that makes features of images: --encoder"):
        train_run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"-o parts\.early\.length=\.\.\. or -o parts\.late\.length"):
        resolve(backbone="llama", task="alpaca", method="v2", options=["prefix.length=3"])
    with pytest.raises(ConfigError, match=r"no context source named 'visual'\. Did you mean 'visual-tokens'"):
        resolve(backbone="llama", task="alpaca", options=["context=visual"])
    with pytest.raises(ConfigError, match=r"the method 'lora' attaches no adapter, which .tuning. belong"):
        resolve(backbone="llama", task="alpaca", options=["method=lora", "tuning.bias=true"])
    with pytest.raises(ConfigError, match="no setting 'hiden'"):
        train_run(configured(model, "v1-multimodal", tmp_path / "cache", "context.hiden=4"), tmp_path / "other")


def test_options_go_over_what_a_method_begins_with() -> None:
    def of(*options: str, method: str = "v2") -> RunConfig:
        return resolve(backbone="llama", task="alpaca", method=method, options=options)[0]

    assert of().adapter().parts["early"].layers == (0,)
    assert of("parts.late.length=7").parts["late"].length == 7
    assert of("parts.late.length=7").parts["early"].length == 20
    assert of("tuning=none").tuning is None
    assert RunConfig.from_dict(of("tuning=none").to_dict()).tuning is None
    changed = of("tuning.scale=input").tuning
    assert changed is not None
    assert (changed.scale, changed.bias) == ("input", True)
    assert of("context=projected-image").context_options == {}
    assert of("context.hidden=64").context_options == {"hidden": 64}
    assert of("tuning.lora_rank=4", method="zero-init").tuning is not None
    assert of(method="v1-multimodal").prefix.prompt == "table+context"
