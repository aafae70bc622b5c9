"""Trackers: what they are told, by Accelerate, and what is said where one is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType

from zinit.errors import ConfigError
from zinit.runs import tracking
from zinit.runs.config import RunConfig
from zinit.train.config import TrainConfig
from zinit.train.events import Evaluated, Event, Gates, Notice, Step

STEP = Step(
    step=3, epoch=0.5, loss=1.5, lr=0.1, grad_norm=2.0, supervised=7, examples=2, seconds=0.1,
    examples_per_second=20.0, tokens_per_second=70.0,
)  # fmt: skip


class Service(ModuleType):
    """In the place of the package of wandb, trackio and mlflow: notes what Accelerate asks of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        self.opened: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.config = SimpleNamespace(update=lambda values, **_: self.opened.update(config=values))
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def init(self, **settings: Any) -> Any:
        self.opened.update(settings)
        return self

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))

    log_metrics = log

    def search_experiments(self, **_: Any) -> list[Any]:
        return []

    def create_experiment(self, *, name: str, **_: Any) -> str:
        self.opened["project"] = name
        return "1"

    def start_run(self, *, run_name: str, **_: Any) -> None:
        self.opened["name"] = run_name

    def log_params(self, values: dict[str, Any]) -> None:
        self.opened.setdefault("config", {}).update(values)

    def finish(self) -> None:
        self.opened["over"] = True

    end_run = finish


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType(request.param)])
    return made


def test_a_tracker_gets_the_settings_and_the_numbers(service: Service, tmp_path: Path) -> None:
    name = service.__name__
    accelerator = Accelerator(cpu=True, **tracking.settings_of(name, tmp_path / "mine"))
    settings = {"train.learning_rate": 0.1, "method": "lora", "data": None, "prefix.layers": (1, 2)}
    tracking.begin(accelerator, name, tmp_path / "mine", settings)
    assert (service.opened["project"], service.opened["name"]) == ("zinit", "mine")
    assert service.opened["config"] == {"train.learning_rate": 0.1, "method": "lora"}
    seen: list[Event] = []
    tracked = tracking.Tracked(accelerator, seen.append)
    events = [STEP, Evaluated(3, {"loss": 2.5, "accuracy": 0.25}), Gates(3, {"a": [0.5]}), Notice("note")]
    for event in events:
        tracked(event)
    assert seen == events
    found = {key: value for _, values in service.logged for key, value in values.items()}
    assert found["train/loss"] == 1.5
    assert (found["eval/loss"], found["eval/accuracy"]) == (2.5, 0.25)
    assert {step for step, values in service.logged if values} == {3}
    accelerator.end_training()
    assert service.opened["over"]


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("mlflow", r"train\.tracker=mlflow needs the package mlflow\. Install it: pip install mlflow"),
        (
            "tensorboard",
            r"train\.tracker=tensorboard needs the package tensorboard\. .*pip install -e '\.\[tensorboard\]'",
        ),
    ],
)
def test_a_missing_package_is_one_message(
    tracker: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        tracking.settings_of(tracker, tmp_path)


def test_what_version_0_1_called_tensorboard() -> None:
    for said, tracker in ((True, "tensorboard"), (False, None)):
        config = RunConfig.from_dict({"backbone": "llama", "task": {"name": "alpaca"}, "train": {"tensorboard": said}})
        assert config.train.tracker == tracker
    with pytest.raises(ConfigError, match="tracker must be one of 'tensorboard', 'wandb', 'trackio', 'mlfl"):
        TrainConfig(tracker="tensorbord")  # pyright: ignore[reportArgumentType]
