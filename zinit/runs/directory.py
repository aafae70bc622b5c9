"""The files of one run: its folder, its log, and the weights beside the prefix."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zinit.config import to_json
from zinit.distributed import launched_rank
from zinit.errors import CheckpointError, ConfigError
from zinit.files import (
    check_plain,
    check_tensors,
    claim,
    is_ours,
    made_folder,
    parsing,
    write_atomically,
)
from zinit.methods import METHODS
from zinit.runs.config import RunConfig
from zinit.runs.record import RECORD, Record, check_no_checkpoint, check_run, split_checkpoint
from zinit.train.checkpoint import latest, load_weights, resume_command, tidy, trainable
from zinit.train.events import Event, Listener, Notice
from zinit.train.strategy import gather_full, shard_like

if TYPE_CHECKING:
    from zinit.tasks.base import Task

TRAINED = "trained.safetensors"
BASELINE = "baseline.safetensors"


def read_run(directory: str | Path) -> tuple[RunConfig, Record]:
    """The settings of a run, and its record.

    Raises:
        CheckpointError: if the folder holds no run, or is a checkpoint in one.
    """
    check_no_checkpoint(directory)
    check_run(directory)
    path = Path(directory) / RECORD
    advice = "Restore it, or start a new run in another folder."
    with parsing(f"{path} is damaged", CheckpointError, advice, also=(ConfigError,)):
        record = Record.read(Path(directory))
        config = RunConfig.from_dict(record.config)
    return config, record


def read_finished_run(directory: str | Path) -> tuple[RunConfig, Record]:
    """The settings of a run that was trained to its end, and its record.

    Raises:
        CheckpointError: if there is no run, or it has not come to its end.
    """
    config, record = read_run(directory)
    if not _is_finished(Path(directory), record):
        raise _unfinished(directory)
    return config, record


def _is_finished(directory: Path, record: Record) -> bool:
    return all((directory / name).is_file() for name in record.weights)


def _unfinished(directory: str | Path) -> CheckpointError:
    return CheckpointError(
        f"the run in {directory} has not finished: there is no adapter yet. Go on with: {resume_command(directory)}"
    )


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run with weights that can be used: those of its end, or of a checkpoint.

    Attributes:
        folder: of the run.
        config: its settings.
        record: what it says of itself.
        checkpoint: whose weights are used; None are those of a finished run.
    """

    folder: Path
    config: RunConfig
    record: Record
    checkpoint: Path | None = None

    @classmethod
    def read(cls, directory: str | Path) -> SavedRun:
        """A run, or one of its checkpoints. Of a run that has not finished the last checkpoint is used.

        Args:
            directory: of a run, or of a checkpoint in it: ``RUN_DIR/resume/step-00000120``.

        Raises:
            CheckpointError: if there is no run, nothing was saved yet, or a checkpoint is not all of its adapter.
        """
        folder, checkpoint = split_checkpoint(directory)
        config, record = read_run(folder)
        if checkpoint is None and not _is_finished(folder, record):
            checkpoint = latest(folder)
            if checkpoint is None:
                raise _unfinished(folder)
        if checkpoint is not None and not checkpoint.is_dir():
            there = ", ".join(sorted(found.name for found in checkpoint.parent.glob("step-*"))) or "none"
            raise CheckpointError(f"there is no checkpoint {checkpoint}. There are: {there}.")
        if checkpoint is not None and (lacking := METHODS.get(config.method)(config.method_options).untrained()):
            finished = _is_finished(folder, record)
            raise CheckpointError(
                f"a checkpoint of {folder} holds what the run trains, and not what it started from "
                f"({', '.join(lacking)}). "
                + (f"Use its end: {folder}" if finished else f"Let it finish: {resume_command(folder)}")
            )
        return cls(folder=folder, config=config, record=record, checkpoint=checkpoint)

    @property
    def adapter(self) -> Path | None:
        """The folder that a method loads its prefix from; None where a checkpoint's weights replace a fresh one's."""
        return self.folder if self.checkpoint is None else None

    @property
    def note(self) -> str:
        """Whose weights are used, for people; empty for those of the run's end."""
        if self.checkpoint is None:
            return ""
        return f"these are the weights of the checkpoint {self.checkpoint.name}, not of the run's end"

    def load_into_task(self, task: Task) -> None:
        """Puts the weights in place: what trains beside the prefix, of a checkpoint all that trains."""
        if self.checkpoint is None:
            load_trained(task, self.folder)
        else:
            load_weights(self.checkpoint, trainable(task))

    def load_into_model(self, model: nn.Module) -> None:
        """As `load_into_task` for a task's model alone: what the task trains beside it is left out."""
        own = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
        if self.checkpoint is not None:
            load_weights(self.checkpoint, own, under="model.")
        elif (self.folder / TRAINED).is_file():
            _load(own, self.folder / TRAINED, under="model.")


@contextmanager
def claimed(output: Path, *, resume: bool, on_event: Listener) -> Iterator[None]:
    """Holds a run's folder for this run alone, if it can take it. Of several processes the main one holds it.

    What a killed run left half written is removed. A folder that is new, and that nothing was written to, is gone
    afterwards.

    Args:
        output: a new or empty folder; with ``resume`` one that holds a run.
        resume: whether the run goes on.
        on_event: told of a claim that is taken over.

    Raises:
        ConfigError: if the folder cannot take the run, or another process holds it.
    """
    _check_path(output)
    if resume:
        _check_content(output, resume)  # nothing is made where there is nothing to go on with
    if launched_rank():
        yield
        return
    with claim(output, tell=lambda text: on_event(Notice(text))):
        _check_content(output, resume)
        tidy(output)
        yield


@contextmanager
def new_folder(wished: Path) -> Iterator[Path]:
    """A folder that no other process has: the one wished for, or the next number of it. Gone again if it stays empty.

    Raises:
        ConfigError, CheckpointError: if it cannot be made.
    """
    with made_folder(wished.parent):
        folder = wished
        for number in itertools.count(2):
            with writing(folder), suppress(FileExistsError):
                folder.mkdir()
                break
            folder = wished.with_name(f"{wished.name}-{number}")
        try:
            yield folder
        finally:
            with suppress(OSError):
                folder.rmdir()


def _check_path(output: Path) -> None:
    """The folder is one, or can be made, and holds nothing of somebody else's.

    Raises:
        ConfigError: if not.
    """
    for path in (output, *output.absolute().parents):
        if path.is_symlink() and not path.exists():
            raise ConfigError(
                f"the output folder {output} cannot be made: {path} links to {path.readlink()}, which is not there. "
                f"Make that folder, or name another with --output."
            )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file; name a folder.")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is not writable.")
    if output.is_dir() and not (output / RECORD).exists() and not all(is_ours(file.name) for file in output.iterdir()):
        raise ConfigError(f"the output folder {output} already holds files. Name another with --output.")


def _check_content(output: Path, resume: bool) -> None:
    """A new run finds no run in the folder, one that goes on finds one.

    Raises:
        ConfigError: if not.
    """
    if resume and not (output / RECORD).is_file():
        raise ConfigError(
            f"there is no run to resume in {output}: none was begun. Start it with the same command without --resume."
        )
    if not resume and (output / RECORD).exists():
        raise ConfigError(
            f"the output folder {output} already holds a run. Name another with --output, or go on with that run: "
            f"{resume_command(output)}"
        )


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
def _load(own: Mapping[str, nn.Parameter], path: Path, *, under: str = "") -> None:
    """Copies a file's weights; with ``under`` those whose names begin so, which need not be all parameters."""
    from safetensors.torch import load

    with parsing(f"{path} is damaged or unreadable", CheckpointError, "Copy it again, or resume the run that made it."):
        tensors = load(path.read_bytes())
    check_plain(tensors, path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(under)}
    own = {name: parameter for name, parameter in own.items() if name in tensors or not under}
    try:
        check_tensors(tensors, {name: tuple(parameter.shape) for name, parameter in own.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not fit the run's settings: {error}") from error
    for name, parameter in own.items():
        parameter.copy_(shard_like(tensors[name], parameter))


def write_json(path: Path, document: dict[str, Any], *, indent: int | None = 2) -> None:
    """Writes a JSON document; it appears whole or not at all. Without ``indent`` it is one line."""
    with writing(path):
        write_atomically(path, to_json(document, indent=indent).encode() + b"\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into an error that says what to do."""
    try:
        yield
    except OSError as error:
        begun = (path.parent / RECORD).is_file()
        again = f"then: {resume_command(path.parent)}" if begun else "then run the same command again."
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}. Make room, {again}") from error


class Log:
    """Appends events to ``log.jsonl`` and passes them on.

    A line that cannot be written ends no training: the user is told once, and the next line is tried again.

    Args:
        output: the run's folder.
        writes: only one process does.
        on_event: gets every event too.
    """

    def __init__(self, output: Path, writes: bool, on_event: Listener) -> None:
        self.path, self.writes, self.on_event, self.told = output / "log.jsonl", writes, on_event, False

    def __call__(self, event: Event) -> None:
        if self.writes:
            try:
                self._append(to_json(event.to_dict()).encode() + b"\n")
            except OSError as error:
                if not self.told:
                    self.told = True
                    reason = error.strerror or error
                    self.on_event(
                        Notice(f"{self.path} cannot be written: {reason}. The run goes on without these lines")
                    )
        self.on_event(event)

    def _append(self, line: bytes) -> None:
        with self.path.open("a+b", buffering=0) as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a kill or a full disk tore the last line: it must not take this one
                    line = b"\n" + line
            file.write(line)
