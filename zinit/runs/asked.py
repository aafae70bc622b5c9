"""A finished run that is asked by suites, and where its results are kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.errors import CheckpointError, ConfigError, ZinitError
from zinit.files import write_atomically
from zinit.models.offload import move
from zinit.runs.build import Built, build_model, build_task, check_models, read_data
from zinit.runs.config import RunConfig
from zinit.runs.directory import TRAINED, SavedRun, write_json, writing
from zinit.runs.record import RESULTS, Results
from zinit.runs.trained_on import TrainedOn
from zinit.tasks import TASKS
from zinit.train.strategy import loading_device, make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.tasks.base import Task

BASE, ADAPTED = "base", "adapted"


@dataclass(kw_only=True)
class OpenRun:
    """A run whose model is ready to be asked.

    Attributes:
        saved: its settings and weights.
        built: its model; what was trained beside the adapter is not in it before `adapt`.
        accelerator: where it runs.
        task: of the run; None where its examples can no longer be read.
        trained_on: its training examples; None where these can no longer be read.
        unknown: why not, in words.
    """

    saved: SavedRun
    built: Built
    accelerator: Accelerator
    task: Task | None = None
    trained_on: TrainedOn | None = None
    unknown: str = ""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.saved.folder

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.saved.config

    def adapt(self) -> None:
        """Adds what was trained beside the adapter: not before the base has been asked, which is without it."""
        if self.task is not None:
            self.saved.load_into_task(self.task)
        elif self.saved.checkpoint is not None:
            self.saved.load_into_model(self.built.adapted.model)


def open_run(directory: str | Path) -> OpenRun:
    """A run's model, and what it was trained on.

    Args:
        directory: of the run, or of a checkpoint in it.

    Raises:
        CheckpointError: if there is no run, or nothing was saved yet.
        ConfigError: if its task does not generate text.
        DataError: if its method keeps weights that only the task can take, and the task's data are gone.
    """
    saved = SavedRun.read(directory)
    config, record = saved.config, saved.record
    if not TASKS.get(config.task).generates:
        raise ConfigError(
            f"the run in {directory} is of the task {config.task!r}, which does not generate text; suites ask in words."
        )
    accelerator = make_accelerator(config.train)
    examples, unknown = None, ""
    try:
        examples = read_data(config, labels=record.labels, device=accelerator.device)
    except ZinitError as error:
        unknown = str(error)
        if (saved.folder / TRAINED).is_file():
            raise
    load_to = loading_device(accelerator, offload=config.offload)
    built = build_model(config, accelerator.device, load_to=load_to, saved=saved.adapter)
    check_models(saved.folder, record, built)
    run = OpenRun(saved=saved, built=built, accelerator=accelerator, unknown=unknown)
    if examples is not None:
        run.task = build_task(config, built, labels=record.labels, examples=examples)
        run.trained_on = TrainedOn(run.task)
    move(built.adapted.model, accelerator.device, offload=config.offload)
    built.adapted.model.eval()
    return run


def keep(
    run: OpenRun,
    suite: str,
    metrics: dict[str, dict[str, float]],
    counts: dict[str, Any],
    files: dict[str, Any],
    output: str | Path | None,
) -> dict[str, Any]:
    """The results as they are printed; also kept in the run's ``metrics.json``, and the answers in ``output``.

    Args:
        run: that was asked.
        suite: its name.
        metrics: of both models.
        counts: what stands behind them.
        files: what goes to ``output``: texts and JSON documents, by file name.
        output: a folder; None writes no answers.

    Raises:
        ConfigError: if the answers cannot be written.
    """
    note = {} if run.trained_on is not None else {"trained_on": f"not known: {run.unknown}"}
    results = {"suite": suite, "metrics": metrics, "counts": counts | note, "seed": run.config.seed}
    if not run.accelerator.is_main_process:
        return results
    if output is not None:
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                if isinstance(content, str):
                    write_atomically(Path(output) / name, content.encode())
                else:
                    write_json(Path(output) / name, content)
        except OSError as error:
            raise ConfigError(f"the answers cannot be written to {output}: {error.strerror}.") from error
    kept = Results.read(run.folder)
    kept.suites[suite] = {"metrics": metrics, "counts": counts | note}
    try:
        with writing(run.folder / RESULTS):
            write_json(run.folder / RESULTS, kept.to_dict())
    except CheckpointError as error:  # the figures are printed all the same
        print(f"note: {error}", file=sys.stderr)
    return results
