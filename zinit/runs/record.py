"""What a run says about itself: its record (``run.json``) and its results (``metrics.json``).

Both are written by the run and read by resuming, evaluation, the report and the benchmark, whatever version wrote them.
"""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self, get_type_hints

from zinit.compat import modern_results
from zinit.errors import CheckpointError
from zinit.files import is_file, is_folder, is_ours, parsing, read_json
from zinit.validation import check_fields

PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "safetensors")
RECORD, RESULTS, EXAMPLES = "run.json", "metrics.json", "examples.json"
RESUME = "resume"  # the folder of checkpoints


def split_checkpoint(directory: str | Path) -> tuple[Path, Path | None]:
    """A run's folder, and the checkpoint in it that a path names, if it does: ``RUN_DIR/resume/step-00000120``."""
    path = Path(directory)
    inside = path.parent.name == RESUME and not is_file(path / RECORD)
    return (path.parent.parent, path) if inside else (path, None)


def check_no_checkpoint(directory: str | Path) -> None:
    """A path names no checkpoint of a run, where only a run will do.

    Raises:
        CheckpointError: if it does, naming the run.
    """
    folder, checkpoint = split_checkpoint(directory)
    if checkpoint is not None and is_file(folder / RECORD):
        raise CheckpointError(f"{checkpoint} is a checkpoint, and here a whole run is expected. Name its run: {folder}")


def check_run(directory: str | Path) -> None:
    """A folder holds a run, or is a checkpoint of one. Without torch: what is wrong with a path is said at once.

    Raises:
        CheckpointError: if it holds none.
    """
    directory, _ = split_checkpoint(directory)
    if is_file(directory / RECORD):
        return
    with parsing(f"{directory} cannot be read", CheckpointError):
        killed = is_folder(directory) and all(is_ours(file.name) for file in Path(directory).iterdir())
    expected = (
        "A run that was stopped before it began is started again by its own command, without --resume"
        if killed
        else "Expected a folder of 'zinit train'"
    )
    raise CheckpointError(f"{directory} holds no run: there is no run.json. {expected}.")


def versions() -> dict[str, str]:
    """Python and the libraries a result depends on."""
    import zinit

    return {
        "zinit": zinit.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run is: written once, before it trains. A file of another version may lack a field or hold others.

    Attributes:
        config: the settings, as `RunConfig.to_dict` gives them.
        backbone: registered name.
        task: registered name.
        model: folder or Hub id, or "embedded demo".
        data: file, folder or Hub id, or "embedded demo".
        demo: whether the model is the embedded one.
        seed: of everything random.
        preset: its full name.
        scaled: what of the preset was scaled to a smaller model or a shorter run, or chosen for the model without one.
        method: registered name.
        prefix: the prefix's settings, for methods that have one.
        labels: class names, for tasks that have classes.
        weights: files that a finished run has.
        train: settings of the loop.
        fingerprint: a hash of the examples.
        identity: what decides the result; see `zinit.train.checkpoint.check_identity`.
        key_probe: a sample of the host's weights; None for a model that no backbone knows.
        models: what tells the task's further models from others, by name.
        counts: what was read, split, truncated and skipped.
        num_trainable: how many numbers train.
        rates: {role: {"rate": its highest, "numbers": how many train at it}}; "group.role" where there are several
            groups. Empty for methods that take no steps.
        warm_start: what it started from: its place and the hashes of its files.
        processes: how many trained.
        strategy: how Accelerate calls what spreads the run.
        launch: torchrun's name of the launch.
        device: of the main process.
        versions: of Python and libraries.
    """

    config: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    task: str | None = None
    model: str | None = None
    data: str | None = None
    demo: bool = False
    seed: int | None = None
    preset: str | None = None
    scaled: list[str] = field(default_factory=list)
    method: str | None = None
    prefix: dict[str, Any] | None = None
    labels: list[str] | None = None
    weights: list[str] = field(default_factory=lambda: ["adapter.json"])
    train: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    key_probe: list[float] | None = None
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    num_trainable: int | None = None
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    warm_start: dict[str, Any] = field(default_factory=dict)
    processes: int | None = None
    strategy: str | None = None
    launch: str | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``run.json``; what few runs have (further models, a warm start) only where there is some."""
        some = ("models", "scaled", "rates", "warm_start")
        return {name: value for name, value in vars(self).items() if name not in some or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads ``run.json`` of any version.

        Raises:
            ConfigError: if a field holds something of another type.
        """
        types = get_type_hints(cls)
        check_fields(values, types, optional=types)
        return cls(**_known(cls, values))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The record of a run.

        Raises:
            CheckpointError, ConfigError: if it is missing or damaged.
        """
        return cls.from_dict(_read_json(directory / RECORD))


@dataclass(kw_only=True)
class Results:
    """What a run measured so far.

    Attributes:
        metrics: of the base ("base": the adapter switched off) and, once trained, of the "adapted" model.
        baseline: what the base is, in words.
        seed: of everything random.
        counts: what was read and evaluated.
        samples: inputs with the expected output, the base's and the adapted model's.
        steps: optimizer steps; None until the run is finished.
        seconds: of training; None until the run is finished.
        num_trainable: how many numbers were trained; None until the run is finished.
        best: figure, value and step of the weights that were kept, where ``train.keep_best`` chose them.
        suites: figures and counts of the suites that a finished run was evaluated on, by name.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline: str | None = None
    seed: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    steps: int | None = None
    seconds: float | None = None
    num_trainable: int | None = None
    best: dict[str, Any] = field(default_factory=dict)
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``metrics.json``; what only a finished run has is left out before."""
        finished = ("steps", "seconds", "num_trainable", "best", "suites")
        return {name: value for name, value in vars(self).items() if name not in finished or value not in (None, {})}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads ``metrics.json`` of any version."""
        return cls(**_known(cls, modern_results(values)))

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The results of a run; empty if there are none, or a kill tore the file."""
        try:
            return cls.from_dict(_read_json(directory / RESULTS))
        except (CheckpointError, ValueError):
            return cls()


def _read_json(path: Path) -> dict[str, Any]:
    document = read_json(path, CheckpointError, "Restore it, or start a new run in another folder.")
    if not isinstance(document, dict):
        raise ValueError(f"it holds {type(document).__name__}, not named values")
    return document


def _known(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values that a class has a field for."""
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
