"""The files of one run: its folder, its log, and the weights beside the prefix."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zinit.config import to_json
from zinit.errors import CheckpointError, ConfigError
from zinit.files import check_tensors, write_atomically
from zinit.runs.config import RunConfig
from zinit.runs.record import RECORD, Record
from zinit.train.events import Event, Listener
from zinit.train.strategy import gather_full, shard_like

if TYPE_CHECKING:
    from zinit.tasks.base import Task

TRAINED = "trained.safetensors"
BASELINE = "baseline.safetensors"


def read_run(directory: str | Path) -> tuple[RunConfig, Record]:
    """The settings of a run, and its record.

    Raises:
        CheckpointError: if the folder holds no run.
    """
    path = Path(directory) / RECORD
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no run: there is no run.json. Expected a folder of 'zinit train'.")
    try:
        record = Record.read(Path(directory))
        config = RunConfig.from_dict(record.config)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    return config, record


def read_finished_run(directory: str | Path) -> tuple[RunConfig, Record]:
    """The settings of a run that was trained to its end, and its record.

    Raises:
        CheckpointError: if there is no run, or it has not come to its end.
    """
    config, record = read_run(directory)
    if not all((Path(directory) / name).is_file() for name in record.weights):
        raise CheckpointError(
            f"the run in {directory} has not finished: there is no adapter yet. "
            f"Go on with: zinit train --resume --output {directory}"
        )
    return config, record


def check_output(output: Path, resume: bool) -> None:
    """A run goes into a new or empty folder that can be written, or goes on in its own.

    Raises:
        ConfigError: if it cannot.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file; name a folder.")
    if resume:
        if not (output / "run.json").is_file():
            raise ConfigError(f"there is no run to resume in {output}.")
    elif output.is_dir() and any(output.iterdir()):
        what = "a run" if (output / "run.json").exists() else "files"
        raise ConfigError(
            f"the output folder {output} already holds {what}. Name another with --output, "
            f"or go on with that run: --resume --output {output}"
        )
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is not writable.")


def launch_id() -> str | None:
    """What torchrun calls the launch that this process belongs to; restarts keep it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def was_restarted(output: Path) -> bool:
    """Whether torchrun (--max-restarts) has started this process anew and the run in ``output`` began before that."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (output / "run.json").is_file():
        return False
    return read_run(output)[1].launch == launch_id()


def save_trained(task: Task, directory: Path, *, writes: bool = True) -> None:
    """Writes ``trained.safetensors``: what trains beside the prefix. Nothing is written where nothing does.

    Args:
        task: after training.
        directory: of the run.
        writes: only one process does; the others help to gather what is sharded.

    Raises:
        CheckpointError: if it cannot be written.
    """
    _save(task.trained(), directory / TRAINED, writes)


def load_trained(task: Task, directory: Path) -> None:
    """Reads what `save_trained` wrote into a task built from the same settings.

    Raises:
        CheckpointError: if it is missing or damaged, or names or shapes differ.
    """
    if own := task.trained():
        _load(own, directory / TRAINED)


def save_baseline(task: Task, directory: Path, *, writes: bool = True) -> None:
    """Writes ``baseline.safetensors`` inside `Task.frozen_baseline`: what that scope has set. See `save_trained`."""
    _save(task.baseline_parameters(), directory / BASELINE, writes)


def load_baseline(task: Task, directory: Path) -> bool:
    """Reads what `save_baseline` wrote; False if there is nothing, as in folders of earlier versions."""
    if found := (directory / BASELINE).is_file():
        _load(task.baseline_parameters(), directory / BASELINE)
    return found


def _save(own: Mapping[str, nn.Parameter], path: Path, writes: bool) -> None:
    from safetensors.torch import save

    tensors = {name: gather_full(parameter).cpu().contiguous() for name, parameter in own.items()}
    if tensors and writes:
        with writing(path):
            write_atomically(path, save(tensors, metadata={"format": "pt"}))


@torch.no_grad()
def _load(own: Mapping[str, nn.Parameter], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. The run needs it.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy it again, or resume the run that made it.") from error
    try:
        check_tensors(tensors, {name: tuple(parameter.shape) for name, parameter in own.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit the run's settings: {error}") from error
    for name, parameter in own.items():
        parameter.copy_(shard_like(tensors[name], parameter))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document; it appears whole or not at all."""
    with writing(path):
        write_atomically(path, to_json(document, indent=2).encode() + b"\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Make room, then: "
            f"zinit train --resume --output {path.parent}"
        ) from error


class Log:
    """Appends events to ``log.jsonl`` and passes them on.

    Args:
        output: the run's folder.
        writes: only one process does.
        on_event: gets every event too.
    """

    def __init__(self, output: Path, writes: bool, on_event: Listener) -> None:
        self.path, self.writes, self.on_event = output / "log.jsonl", writes, on_event
        if writes and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:  # a kill tore the last line: it must not take the next
                file.write("\n")

    def __call__(self, event: Event) -> None:
        if self.writes:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(event.to_dict()) + "\n")
        self.on_event(event)
