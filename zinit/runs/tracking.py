"""Trackers: Accelerate hands a run's figures to TensorBoard, Weights & Biases, Trackio or MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.errors import ConfigError, install_extra
from zinit.train.events import Event, Listener, Step

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "zinit"
EXTRAS = {"tensorboard": "tensorboard"}  # by tracker; the others are installed by their own name


def settings_of(tracker: str | None, output: Path) -> dict[str, Any]:
    """What the accelerator is made with.

    Raises:
        ConfigError: if the tracker's package is missing.
    """
    if tracker is None:
        return {}
    if find_spec(tracker) is None:
        how = install_extra(EXTRAS[tracker]) if tracker in EXTRAS else f"Install it: pip install {tracker}"
        raise ConfigError(f"train.tracker={tracker} needs the package {tracker}. {how}")
    return {"log_with": tracker, "project_dir": str(output)}


def begin(accelerator: Accelerator, tracker: str, output: Path, settings: Mapping[str, Any]) -> None:
    """Opens the run at its tracker, under the name of its folder.

    Args:
        accelerator: made with `settings_of`.
        tracker: its name.
        output: the run's folder.
        settings: of the run, by their full names; what is no plain value is left out.
    """
    if tracker == "tensorboard":
        accelerator.init_trackers(tracker)  # a folder of this name, in the run's own
        return
    name = output.resolve().name
    named: dict[str, Any] = {
        "wandb": {"name": name, "dir": str(output)},
        "trackio": {"name": name},
        "mlflow": {"run_name": name},
    }
    plain = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
    accelerator.init_trackers(PROJECT, config=plain, init_kwargs={tracker: named[tracker]})


class Tracked:
    """Hands the numbers of events to the run's tracker after they are logged.

    Args:
        accelerator: with trackers.
        log: gets every event first.
    """

    def __init__(self, accelerator: Accelerator, log: Listener) -> None:
        self.accelerator, self.log = accelerator, log

    def __call__(self, event: Event) -> None:
        self.log(event)
        document = event.to_dict()
        numbers = {k: v for k, v in document.items() if isinstance(v, int | float) and k != "step"}
        prefix = "train" if isinstance(event, Step) else event.kind
        self.accelerator.log({f"{prefix}/{k}": v for k, v in numbers.items()}, step=document.get("step"))
