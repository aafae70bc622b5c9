"""One run: built from its settings, trained, evaluated; its directory holds everything."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.fingerprint import cosine
from zinit.adapter.handle import Handle
from zinit.errors import CheckpointError, ConfigError, DataError
from zinit.methods.base import Method
from zinit.models.offload import weights_in_place
from zinit.runs.build import Built, build_model, build_task, check_models
from zinit.runs.directory import (
    TRAINED,
    Log,
    check_output,
    launch_id,
    read_results,
    read_run,
    save_baseline,
    save_trained,
    was_restarted,
    write_json,
    writing,
)
from zinit.runs.evaluate import evaluate
from zinit.runs.record import versions
from zinit.runs.settings import SECTIONS, RunConfig
from zinit.train import activation_cache
from zinit.train.checkpoint import check_identity
from zinit.train.loop import Event, Interrupted, Plan, fit
from zinit.train.strategy import in_words, loading_device, make_accelerator, place

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.tasks.base import Task

# Settings that a resumed run may change. (Other micro-batches sum in another order: the same result but for rounding.)
# Where model and data lie is indifferent too: what is in them is compared.
INDIFFERENT = (
    *(f"train.{name}" for name in ("micro_batch_size", "micro_batch_tokens", "evaluate_every", "save_every")),
    *("train.workers", "train.tensorboard", "train.trunk_cache", "task.packing"),
    *("model", "data", "task.held_out_data", "task.evaluation_limit", "offload"),
)
SAME_MODEL = 0.999  # cosine of two samples of the weights


def train_run(
    config: RunConfig,
    output: str | Path,
    *,
    preset: str | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Trains and evaluates; the run's directory holds everything.

    Args:
        config: what to run.
        output: a new or empty folder; with ``resume`` one that holds this run.
        preset: its name, for the record.
        resume: go on from the last checkpoint. A run that torchrun starts anew (--max-restarts) does so by itself.
        on_event: also gets every event that is logged.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: if the folder already holds something.
        Interrupted: on a signal, after saving.
    """
    output = Path(output)
    resume = resume or was_restarted(output)
    check_output(output, resume)
    extra = _tensorboard(output) if config.train.tensorboard else {}
    accelerator = make_accelerator(config.train, **extra)
    from accelerate.utils import set_seed

    set_seed(config.seed, device_specific=True)  # for the host's dropout; each process has draws of its own
    on_event({"event": "stage", "text": f"loading model and data; {in_words(accelerator)}"})
    built = build_model(config, accelerator.device, load_to=loading_device(accelerator, offload=config.offload))
    task, disabled = build_task(config, built), built.adapted.disabled
    if not len(task.train_stream):
        raise DataError(f"nothing is left to train on: {task.data_report()}.")
    if not any(parameter.requires_grad for parameter in task.parameters()):
        raise ConfigError(
            f"the method {config.method!r} leaves nothing to train: the task {config.task!r} has no head of its own."
        )
    if type(built.method).solve is Method.solve:  # the engine will train: what cannot be planned is said now
        Plan(config.train, task.train_stream, config.seed)
        activation_cache.check(task, config.train, accelerator)
    elif config.train.trunk_cache is not None:
        raise ConfigError(f"train.trunk_cache is of no use to the method {config.method!r}, which takes no steps.")
    place(task, accelerator, offload=config.offload)
    with disabled(), weights_in_place(task):
        task.prepare()
    identity = _identity(config, task)
    if resume:
        _check_same_run(output, identity, built)
    accelerator.wait_for_everyone()  # nobody creates the folder before everybody has looked at it
    document = {
        "config": config.to_dict(),
        "backbone": config.backbone,
        "task": config.task,
        "model": config.model or "embedded demo",
        "data": config.data or "embedded demo",
        "demo": config.model is None,
        "seed": config.seed,
        "preset": preset,
        "method": config.method,
        "prefix": None if task.handle is None else task.handle.config.to_dict(),
        "labels": task.labels,
        "weights": [*(["adapter.json"] if task.handle else []), *([TRAINED] if task.trained() else [])],
        "train": config.train.to_dict(),
        "fingerprint": identity["examples"],
        "identity": identity,
        "key_probe": built.key_probe,
        **({"models": built.identities} if built.identities else {}),
        "counts": task.data_report(),
        "num_trainable": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "processes": accelerator.num_processes,
        "strategy": accelerator.distributed_type.value,
        "launch": launch_id(),
        "device": str(accelerator.device),
        "versions": versions(),
    }
    log = Log(output, accelerator.is_main_process, on_event)
    if accelerator.is_main_process:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        if not (resume and (output / "run.json").exists()):
            write_json(output / "run.json", document)
    if config.train.tensorboard:
        accelerator.init_trackers("tensorboard")
    results = read_results(output) if resume else {}
    if "frozen" not in results.get("metrics", {}):
        on_event({"event": "stage", "text": "evaluating the frozen model"})
        with disabled(), task.frozen_baseline():
            frozen = evaluate(task, config, accelerator)
            save_baseline(task, output, writes=accelerator.is_main_process)
        results = {"metrics": {"frozen": frozen.metrics}, "baseline": task.baseline, "seed": config.seed}
        results["counts"] = task.data_report()
        results["samples"] = [
            {"prompt": sample["prompt"], "expected": sample["expected"], "frozen": sample["output"]}
            for sample in frozen.samples
        ]
        log({"event": "eval", "step": 0, **frozen.metrics})
        if accelerator.is_main_process:
            write_json(output / "metrics.json", results)

    def record(event: Event) -> None:
        log(event)
        if config.train.tensorboard:
            numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
            prefix = "train" if event["event"] == "step" else event["event"]
            accelerator.log({f"{prefix}/{k}": v for k, v in numbers.items()}, step=event.get("step"))

    started = time.perf_counter()
    try:
        steps = 0
        if not built.method.solve(task):
            steps = fit(
                task,
                config.train,
                seed=config.seed,
                accelerator=accelerator,
                directory=output,
                identity=identity,
                resume=resume,
                on_event=record,
            )
    except Interrupted as interruption:
        log({"event": "stop", "step": interruption.step})
        _report(output, accelerator)
        raise
    trained = time.perf_counter() - started
    # Before the evaluation: nothing that happens there can lose it.
    save_trained(task, output, writes=accelerator.is_main_process)
    if accelerator.is_main_process and task.handle is not None:
        _save_adapter(task.handle, output, built.key_probe)
    on_event({"event": "stage", "text": "evaluating the adapted model"})
    adapted = evaluate(task, config, accelerator)
    results["metrics"]["adapted"] = adapted.metrics
    results["counts"] |= adapted.counts
    for sample, answered in zip(results["samples"], adapted.samples, strict=False):
        sample["adapted"] = answered["output"]
    results |= {"steps": steps, "seconds": round(trained, 2), "num_trainable": document["num_trainable"]}
    if accelerator.is_main_process:
        for name, artifact in task.artifacts().items():
            write_json(output / name, artifact)
        write_json(output / "metrics.json", results)
        log({"event": "eval", "step": steps, **adapted.metrics})
        log({"event": "end", "step": steps})
        _report(output, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What decides the result bit for bit: a resumed run must have all of it in common with the one that saved."""
    settings = config.to_dict()
    tables = {section: settings.pop(section) for section in SECTIONS}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    sources = [spec.source for spec in task.further_models(config.options).values()]
    flat = {name: value for name, value in flat.items() if not (name.startswith("task.") and value in sources)}
    return {
        name: value
        for name, value in {**settings, **flat, "examples": task.fingerprint()}.items()
        if name not in INDIFFERENT
    }


def _check_same_run(output: Path, identity: dict[str, Any], built: Built) -> None:
    """A resumed run is the one that the folder holds, whether or not it has come to a checkpoint yet."""
    _, document = read_run(output)
    check_identity(output, document.get("identity", {}), identity)
    check_models(output, document, built)
    before, key_probe = document.get("key_probe"), built.key_probe
    if before and key_probe and not cosine(before, key_probe) >= SAME_MODEL:
        raise CheckpointError(
            f"the run in {output} cannot go on: the weights of the frozen model are not the ones it started on. "
            f"Restore them, or start a new run in another folder."
        )


def _save_adapter(handle: Handle, output: Path, key_probe: list[float] | None) -> None:
    """As `Handle.save`; a sharded host cannot be asked for its weights any more, so the sample is handed in."""
    file = handle.to_file()
    sample = file.fingerprint["key_probe"] or key_probe
    try:
        dataclasses.replace(file, fingerprint={**file.fingerprint, "key_probe": sample}).write(output)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Make room, then: zinit train --resume --output {output}") from error


def _tensorboard(output: Path) -> dict[str, Any]:
    if find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard=true needs the package tensorboard: pip install 'zinit[tensorboard]'.")
    return {"log_with": "tensorboard", "project_dir": str(output)}


def _report(output: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        from zinit.runs.report import write_report

        with writing(output / "report.html"):
            write_report(output)
