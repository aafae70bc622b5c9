"""A warm start: the weights of a saved adapter or of a finished run, in place of fresh ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zinit.adapter.file import DESCRIPTION, FILES, AdapterFile
from zinit.config import ONLY, AdapterConfig
from zinit.errors import CheckpointError, ConfigError
from zinit.files import is_file, is_folder, local_path
from zinit.methods import METHODS
from zinit.methods.base import Method
from zinit.runs.directory import TRAINED, load_trained, read_finished_run
from zinit.runs.record import RECORD, check_no_checkpoint
from zinit.train.strategy import shard_like
from zinit.validation import shown

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle
    from zinit.runs.config import RunConfig
    from zinit.tasks.base import Task

OF_THE_START = ("gate_init", "init_std", "layers", "towers")  # of a prefix: how it began; layers are compared by name


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """What a run starts from, read and checked.

    Attributes:
        source: folder or Hub id.
        adapter: None where the run's method has none.
        folder: that holds what trains beside the prefix; None where nothing of it is taken.
        sha256: {file: hash}.
    """

    source: str
    adapter: AdapterFile | None
    folder: Path | None
    sha256: dict[str, str]

    @classmethod
    def read(cls, source: str, task: Task, method: Method) -> WarmStart:
        """Reads an adapter, or what a finished run trained.

        Args:
            source: folder or Hub id.
            task: fresh, with all that will train.
            method: of the run.

        Raises:
            ConfigError: if the method takes no start.
            CheckpointError: if it does not fit; the message says what was found and what was expected.
        """
        if type(method).solve is not Method.solve:
            raise ConfigError(f"the method {method.name!r} computes its result and starts from nothing: no --from.")
        folder, hashes, adapter = local_path(source), {}, None
        _check_run(folder, task, method)
        if task.handle is not None:
            adapter = AdapterFile.read(source)
            adapter.check_model(task.model)
            _check_fits(adapter, task.handle, source)
            _check_complete(adapter, task.handle, method, source)
            hashes |= adapter.sha256
        own = is_file(folder / TRAINED)
        if own:
            hashes[TRAINED] = hashlib.sha256((folder / TRAINED).read_bytes()).hexdigest()
        if own and not task.trained():
            raise CheckpointError(
                f"{source} holds {TRAINED}, and the task {task.name!r} with the method {method.name!r} trains nothing "
                f"beside the prefix. To take the prefix alone, copy {DESCRIPTION} and {', '.join(FILES)} elsewhere."
            )
        if not hashes:
            raise CheckpointError(f"{source} holds neither {DESCRIPTION} nor {TRAINED}. Expected a run or an adapter.")
        return cls(source=source, adapter=adapter, folder=folder if own else None, sha256=hashes)

    @torch.no_grad()
    def copy_to(self, task: Task) -> None:
        """Puts the weights in place, on the processes that have them; what the file does not have stays as it is."""
        if self.adapter is not None and task.handle is not None:
            own = dict(task.handle.named_parameters())
            saved = {name: shard_like(tensor, own[name]) for name, tensor in self.adapter.tensors.items()}
            task.handle.load_state_dict({**task.handle.state_dict(), **saved})
        if self.folder is not None:
            load_trained(task, self.folder)

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"source": self.source, "sha256": self.sha256}


def _check_run(folder: Path, task: Task, method: Method) -> None:
    """A folder of a run holds a finished one, of the same classes, with weights of the kind that the method trains."""
    check_no_checkpoint(folder)
    if not is_folder(folder) or not is_file(folder / RECORD):
        return
    _, record = read_finished_run(folder)
    wanted = TRAINED if task.handle is None else DESCRIPTION
    if wanted not in record.weights:
        raise CheckpointError(
            f"{folder} is a run of the method {record.method!r} and holds no {wanted}, which the method "
            f"{method.name!r} starts from. Go on by its own method (-o method={record.method}), or start from another."
        )
    if TRAINED in record.weights and task.trained() and record.labels != task.labels:
        raise CheckpointError(
            f"{folder} was trained on other classes: {_few(record.labels)}, and here they are {_few(task.labels)}."
        )


def check_has_start(config: RunConfig) -> None:
    """A method that leaves a part of the adapter as another run has made it is given that run.

    Raises:
        ConfigError: if it is not.
    """
    method: Method = METHODS.get(config.method)(config.method_options)
    if config.warm_start is None and method.untrained():
        raise ConfigError(
            f"the method {method.name!r} with {shown(method.config.to_dict())} goes on with what a first stage has "
            f"made ({', '.join(method.untrained())}), and got none: name its run or adapter, --from RUN."
        )


def check_same_start(run_folder: Path, recorded: Mapping[str, Any], start: WarmStart | None) -> None:
    """A run goes on from where it started.

    Args:
        run_folder: for the message.
        recorded: of the run, see `WarmStart.to_dict`; empty where it started afresh.
        start: of the run that goes on.

    Raises:
        CheckpointError: if that is another one.
    """
    if recorded.get("sha256") != (None if start is None else start.sha256):
        raise CheckpointError(
            f"the run in {run_folder} started from {recorded.get('source', 'fresh weights')}; expected the same files, "
            f"and got {'none' if start is None else start.source}, which are others. Restore them there."
        )


def _few(labels: list[str] | None) -> str:
    return "none" if labels is None else f"{len(labels)} ({', '.join(labels[:3])}{', ...' * (len(labels) > 3)})"


def _check_fits(adapter: AdapterFile, handle: Handle, source: str) -> None:
    """Every tensor of the file has its place in the run's adapter, and means the same there.

    A run may have more: a part or a tuning that the file lacks starts fresh.
    """
    ours, theirs = AdapterConfig.of(handle.config), AdapterConfig.of(adapter.config)
    for name, found, expected in _differences(ours, theirs):
        raise CheckpointError(
            f"the adapter in {source} does not fit: its {name} is {found!r}, and this run's is {expected!r}. "
            f"Take what it was trained with: -o {name}=..."
        )
    places = {name: tuple(parameter.shape) for name, parameter in handle.named_parameters()}
    for name, tensor in sorted(adapter.tensors.items()):
        shape = places.get(name)
        if shape != tuple(tensor.shape):
            here = "no such parameter" if shape is None else f"the shape {shape}"
            raise CheckpointError(
                f"the adapter in {source} does not fit: it has {name} of shape {tuple(tensor.shape)}, and this run has "
                f"{here}. Train with the parts, layers and lengths that it was trained with."
            )
    seen = handle.encoder if theirs.context is not None else None
    if seen is not None and (text := seen.difference(adapter.encoder or {})):
        raise CheckpointError(f"the adapter in {source} was trained with another encoder: {text}.")


def _check_complete(adapter: AdapterFile, handle: Handle, method: Method, source: str) -> None:
    """Whatever the method does not train is in the file."""
    kept = {id(p) for role, parameters in handle.roles().items() if role in method.untrained() for p in parameters}
    missing = [name for name, p in handle.named_parameters() if id(p) in kept and name not in adapter.tensors]
    if missing:
        raise CheckpointError(
            f"the adapter in {source} is no first stage of this run: it has no {missing[0]}, nor {len(missing) - 1} "
            f"others that the method {method.name!r} does not train here. Train it with the same prefix and context."
        )


def _differences(ours: AdapterConfig, theirs: AdapterConfig) -> Iterator[tuple[str, Any, Any]]:
    """(setting, the file's value, the run's) of what both have and what changes the meaning of the tensors."""
    for name, part in theirs.parts.items():
        if name in ours.parts:
            where = "prefix" if name == ONLY else f"parts.{name}"
            yield from _unequal(where, part.to_dict(), ours.parts[name].to_dict(), OF_THE_START)
    if theirs.context is not None and ours.context is not None:
        if theirs.context != ours.context:
            yield "context", theirs.context, ours.context
        yield from _unequal("context", theirs.context_options, ours.context_options)
    if theirs.tuning is not None and ours.tuning is not None:
        yield from _unequal("tuning", theirs.tuning.to_dict(), ours.tuning.to_dict())


def _unequal(
    where: str, found: Mapping[str, Any], expected: Mapping[str, Any], but: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    for name in [*found, *(expected.keys() - found.keys())]:
        if name not in but and found.get(name) != expected.get(name):
            yield f"{where}.{name}", found.get(name), expected.get(name)
