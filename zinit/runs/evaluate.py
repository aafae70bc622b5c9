"""Evaluates a run: the base and the adapted model on the held-out examples, or on other data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.errors import ConfigError
from zinit.models.offload import weights_in_place
from zinit.runs.agreement import check_agreement
from zinit.runs.build import build_model, build_task, check_models, read_data
from zinit.runs.config import RunConfig
from zinit.runs.directory import SavedRun, load_baseline, write_json
from zinit.runs.images import encode_images, mix_features, open_retrieval
from zinit.runs.settings import absolute_path, override
from zinit.train.held_out import held_out_loss
from zinit.train.strategy import loading_device, make_accelerator, place

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.tasks.base import Evaluation, Task


def evaluate_run(
    directory: str | Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    experts: str | None = None,
    index: str | None = None,
    retrieval: Sequence[str] = (),
) -> dict[str, Any]:
    """The base and the adapted model of a run on its held-out examples, or on other data.

    Of a run that has not finished, the weights are those of its last checkpoint.

    The base is left out where its baseline needs training data that are not read, and the run kept none.

    Args:
        directory: of the run, or of a checkpoint in it.
        data: evaluate on all of this instead.
        limit: examples an answer is generated for.
        output: a folder for what the adapted model answered, such as ``predictions.json``.
        experts: what writes about the images, as ``task.experts`` has it; empty for none, None as the run was made.
        index: folder of an index that what the adapter sees is mixed with; None mixes nothing.
        retrieval: how, see `zinit.runs.images.open_retrieval`.
    """
    run = SavedRun.read(directory)
    config, record = _asked(run.config, data, experts), run.record
    mixing = None if index is None else open_retrieval(index, retrieval)  # what is wrong with it is said at once
    accelerator = make_accelerator(config.train)
    load_to = loading_device(accelerator, offload=config.offload)
    examples = read_data(config, labels=record.labels, train=data is None, device=accelerator.device)
    built = build_model(config, accelerator.device, load_to=load_to, saved=run.adapter)
    check_models(run.folder, record, built)
    task = build_task(config, built, labels=record.labels, train=data is None, examples=examples)
    if mixing is not None:
        mix_features(task, mixing)
    given = {"the run": str(directory), "--data": data, "--limit": limit, "--experts": experts}
    given |= {"--index": (index, *retrieval), "what was read": task.data_report()}
    check_agreement(accelerator, given)
    place(task, accelerator, offload=config.offload)
    encode_images(task, accelerator)
    metrics = {}
    kept = load_baseline(task, run.folder)
    if known := kept or data is None or not task.baseline_parameters():
        with built.adapted.disabled(), nullcontext() if kept else task.frozen_baseline():
            metrics["base"] = evaluate(task, config, accelerator, limit).metrics
    run.load_into_task(task)  # not before: the base is without them
    adapted = evaluate(task, config, accelerator, limit)
    if output is not None and accelerator.is_main_process:
        write_artifacts(task, Path(output))
    return {
        "metrics": metrics | {"adapted": adapted.metrics, **controlled(task, config, accelerator, limit)},
        "baseline": task.baseline if known else f"left out, as the run has not kept what it takes: {task.baseline}",
        "counts": {**task.data_report(), **adapted.counts},
        "seed": config.seed,
        **({} if mixing is None else {"index": mixing.folder, "retrieval": mixing.config.to_dict()}),
        **({"note": run.note} if run.note else {}),
    }


def _asked(config: RunConfig, data: str | None, experts: str | None) -> RunConfig:
    """A run's settings with other held-out data and experts, where there are some."""
    if experts is not None:
        config = override(config, options=[f"task.experts={experts or '[]'}"])
    if data is not None:
        options = dataclasses.replace(config.options, held_out_data=absolute_path(data))
        config = dataclasses.replace(config, options=options)
    return config


def controlled(
    task: Task, config: RunConfig, accelerator: Accelerator, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The figures of the adapted model in each of the task's controls, by name: `Task.controls`."""
    found = {}
    for name, control in task.controls().items():
        with control():
            found[name] = evaluate(task, config, accelerator, limit).metrics
    return found


def write_artifacts(task: Task, folder: Path) -> None:
    """Writes what a task's last evaluation answered.

    Raises:
        ConfigError: if the task keeps no answers, or the folder cannot be written to.
    """
    artifacts = task.artifacts()
    if not artifacts:
        raise ConfigError(f"the task {task.name!r} keeps no answers in files. Leave --output out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, document in artifacts.items():
            write_json(folder / name, document)
    except OSError as error:
        raise ConfigError(f"the answers cannot be written to {folder}: {error.strerror}.") from error


def evaluate(task: Task, config: RunConfig, accelerator: Accelerator, limit: int | None = None) -> Evaluation:
    """The task as it stands now: its held-out loss, then everything else it reports."""
    losses: list[tuple[float, float]] = []
    with weights_in_place(task):
        loss, count = held_out_loss(task, config.train, accelerator, parts=losses)
        apart = {
            f"loss/{name}": held_out_loss(task, config.train, accelerator, chosen=chosen)[0]
            for name, chosen in task.held_out_groups().items()
        }
    with accelerator.autocast(), weights_in_place(task):
        evaluation = task.evaluate(accelerator, limit=limit)
    of_text = {"perplexity": math.exp(loss) if loss < 700 else math.inf} if task.generates else {}
    evaluation.metrics = ({"loss": loss, **of_text, **apart} if count else {}) | evaluation.metrics
    evaluation.counts = {"held_out_units": count, **evaluation.counts}
    if count and accelerator.num_processes == 1:
        evaluation.examples = {"loss": losses, **evaluation.examples}
    return evaluation
