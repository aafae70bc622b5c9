"""Resume checkpoints: what trains, the optimizer's state and the random states; whole or absent.

One folder per checkpoint, ``resume/step-00000120``, built under a temporary name and renamed when every file in it is
on the disk. It holds safetensors and JSON only, no pickles. The data order and the learning rate are functions of the
step and need no state.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit import compat
from zinit.distributed import sum_over_processes
from zinit.errors import CheckpointError, ConfigError
from zinit.files import check_tensors, parsing, read_json
from zinit.train.best import Best
from zinit.train.strategy import gather_full, shard_like
from zinit.validation import NonNegativeInt, check_fields

if TYPE_CHECKING:
    from accelerate import Accelerator

KEEP = 2
# Why the same files may give other examples than an earlier version read.
NEW_RULES = (
    " If the data are the same, they are read by other rules since zinit 0.2: hidden files are no data, images are "
    "known by their content under any suffix, and what is held out is not trained on under another name."
)
UNFINISHED = (".building-*", ".removing-*")  # folders that are no checkpoints: not yet, or no longer
STATE, MANIFEST = "state.safetensors", "manifest.json"
OF_MANIFEST = {  # what is read of it
    "step": NonNegativeInt,
    "identity": dict[str, Any],
    "sha256": dict[str, str],
    "scaler": dict[str, Any] | None,
    "best": dict[str, Any] | None,
}
OF_BEST = {"step": NonNegativeInt, "value": float | None, "since": NonNegativeInt}


def resume_command(directory: Path | str) -> str:
    """What goes on with the run in a folder."""
    return f"zinit train --resume --output {shlex.quote(str(directory))}"


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds: the parameters that train, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save(
    directory: Path,
    step: int,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    accelerator: Accelerator,
    *,
    best: Best | None = None,
) -> Path:
    """Writes a checkpoint; all processes call it.

    Args:
        directory: of the run.
        step: optimizer steps done.
        task: what trains.
        optimizer: torch's own.
        identity: what a resumed run must have in common with this one.
        accelerator: the run's.
        best: kept too, if given.

    Raises:
        CheckpointError: if it cannot be written. The one before is untouched.
    """
    target = directory / "resume" / _folder_name(step)
    building = target.with_name(f".building-{target.name}")
    problem = ""
    tensors = _collect(task, optimizer, best)  # every process takes part, in case something is sharded
    try:
        if accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        accelerator.wait_for_everyone()
        _write(building / f"random-{accelerator.process_index}.json", json.dumps(_random_state()).encode())
        if accelerator.is_main_process:
            _write(building / STATE, _serialize(tensors))
    except OSError as error:
        problem = str(error)
    failed = sum_over_processes(accelerator, torch.tensor(float(bool(problem)), device=accelerator.device)).item()
    if accelerator.is_main_process and not failed:
        try:
            _seal(building, step, identity, accelerator, best)
            if target.exists():
                _remove(target)
            os.replace(building, target)
            _sync_folder(target.parent)
            tidy(directory)
        except OSError as error:
            problem = str(error)
    accelerator.wait_for_everyone()
    if problem or failed:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {target}: {problem or 'another process failed'}. "
            f"The last whole checkpoint is {_name(latest(directory))}. Make room, then: {resume_command(directory)}"
        )
    return target


def _seal(building: Path, step: int, identity: dict[str, Any], accelerator: Accelerator, best: Best | None) -> None:
    """Writes the manifest, which tells a checkpoint's files from others."""
    manifest: dict[str, Any] = {"format_version": 1, "step": step, "identity": identity}
    manifest["scaler"] = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    if best is not None:
        manifest["best"] = best.to_dict()
    manifest["sha256"] = {file.name: _sha256(file) for file in sorted(building.iterdir())}
    _write(building / MANIFEST, json.dumps(manifest, indent=2).encode())


def tidy(directory: Path) -> None:
    """Removes all but the last checkpoints, and what a kill left of others."""
    for old in sorted((directory / "resume").glob("step-*"))[:-KEEP]:
        _remove(old)
    for pattern in UNFINISHED:
        for folder in (directory / "resume").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint, which a kill leaves whole or under another name."""
    going = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going, ignore_errors=True)


def latest(directory: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    folders = sorted((directory / "resume").glob("step-*"))
    return folders[-1] if folders else None


def load_latest(
    directory: Path,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    accelerator: Accelerator,
    *,
    best: Best | None = None,
) -> int:
    """Restores the last whole checkpoint of a run; see `save`.

    Returns:
        Its step, or 0 if there is none: the run starts from its beginning.

    Raises:
        CheckpointError: if it was saved by another run (naming the field that differs), or is damaged.
    """
    folder = latest(directory)
    if folder is None:
        return 0
    advice = f"Remove {folder} to go on from the one before."
    manifest = _read_manifest(folder, advice)
    check_identity(directory, manifest["identity"], identity)
    parameters = trainable(task)
    tensors = _read_state(folder / STATE, parameters, advice)
    with parsing(f"{folder} is damaged", CheckpointError, advice):
        if accelerator.scaler is not None and manifest.get("scaler"):
            accelerator.scaler.load_state_dict(manifest["scaler"])
    _restore(tensors, parameters, optimizer)
    if best is not None and manifest.get("best"):
        best.load(manifest["best"], _under("best:", tensors))
    state = folder / f"random-{accelerator.process_index}.json"
    if state.exists():  # a run may go on with more processes than it had
        with parsing(f"{state} is damaged", CheckpointError, advice):
            _set_random_state(json.loads(state.read_text()))
    return manifest["step"]


def _read_manifest(folder: Path, advice: str) -> dict[str, Any]:
    """What a checkpoint says about itself; its files are those that were written with it.

    Raises:
        CheckpointError: if one of them is not.
    """
    path = folder / MANIFEST
    manifest = read_json(path, CheckpointError, advice)
    with parsing(f"{path} is damaged", CheckpointError, advice, also=(ConfigError,)):
        check_fields(manifest, OF_MANIFEST, optional=("scaler", "best"))
        if manifest.get("best"):
            check_fields(manifest["best"], OF_BEST)
        check_fields(manifest["sha256"], dict.fromkeys((STATE, *(file.name for file in folder.glob("random-*"))), str))
        if folder.name != _folder_name(manifest["step"]):
            raise ConfigError(f"its step is {manifest['step']}.")
    for name, sha256 in manifest["sha256"].items():
        with parsing(f"{folder / name} is damaged", CheckpointError, advice):
            if _sha256(folder / name) != sha256:
                raise ValueError(f"it is not the file that {MANIFEST} beside it describes")
    return manifest


def _read_state(path: Path, parameters: Mapping[str, nn.Parameter], advice: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of these parameters, and of the optimizer for them.

    Raises:
        CheckpointError: if they are others.
    """
    from safetensors.torch import load_file

    with parsing(f"{path} does not fit the run", CheckpointError, advice, also=(CheckpointError,)):
        tensors = load_file(path)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        check_tensors(_under("parameter:", tensors), shapes)
        if kept := _under("best:", tensors):
            check_tensors(kept, shapes)
        for name in tensors:
            if name.startswith("optimizer:") and name.split(":", 2)[-1] not in parameters:
                raise CheckpointError(f"{name} is of no parameter that trains.")
    return tensors


def _under(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one kind, by the names of the parameters."""
    return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}


@torch.no_grad()
def load_weights(folder: Path, parameters: Mapping[str, nn.Parameter], *, under: str = "") -> None:
    """Copies the weights of a checkpoint, and nothing else of it. What it does not hold stays as it is.

    Args:
        folder: of the checkpoint.
        parameters: by name.
        under: how the names begin of those that are taken.

    Raises:
        CheckpointError: if it holds weights of no such name or shape, or is damaged.
    """
    from safetensors.torch import load_file

    advice = "Take another checkpoint of the run."
    _read_manifest(folder, advice)
    with parsing(f"{folder / STATE} does not fit the run", CheckpointError, advice, also=(CheckpointError,)):
        tensors = _under("parameter:", load_file(folder / STATE))
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(under)}
        check_tensors(tensors, {name: tuple(own.shape) for name, own in parameters.items() if name in tensors})
    for name, tensor in tensors.items():
        parameters[name].copy_(shard_like(tensor, parameters[name]))


def check_identity(directory: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What decides the result is as it was.

    Raises:
        CheckpointError: naming the field that differs.
    """
    saved, now = ({**compat.NEW_SETTINGS, **identity} for identity in (saved, now))
    for field in sorted(saved.keys() | now.keys()):
        if saved.get(field) != now.get(field):
            raise CheckpointError(
                f"the run in {directory} cannot go on: {field} was {saved.get(field)!r} when it was saved and is "
                f"{now.get(field)!r} now. Restore it, or start a new run in another folder."
                f"{NEW_RULES if field == 'examples' else ''}"
            )


def _collect(task: nn.Module, optimizer: torch.optim.Optimizer, best: Best | None) -> dict[str, Tensor]:
    tensors = {} if best is None else {f"best:{name}": value for name, value in best.weights.items()}
    for name, parameter in trainable(task).items():
        tensors[f"parameter:{name}"] = gather_full(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer:{key}:{name}"] = gather_full(torch.as_tensor(value))
    return tensors


def _serialize(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    return to_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _restore(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(tensors[f"parameter:{name}"], parameter))
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition(":")
        if kind == "optimizer":
            key, _, name = rest.partition(":")
            parameter = parameters[name]
            # Adam keeps its step count on the CPU, the moments beside the parameter.
            optimizer.state[parameter][key] = value if value.dim() == 0 else shard_like(value, parameter)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _name(folder: Path | None) -> str:
    return folder.name if folder else "none"
