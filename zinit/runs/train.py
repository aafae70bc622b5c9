"""One run, part by part: build, preflight, baseline, fit, publish. Its directory holds everything."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.fingerprint import cosine
from zinit.adapter.handle import Handle
from zinit.errors import CheckpointError, ConfigError, DataError
from zinit.methods.base import Method
from zinit.models.offload import weights_in_place
from zinit.runs import agreement
from zinit.runs.build import Built, build_model, build_task, check_models, read_data
from zinit.runs.card import CARD, write_card
from zinit.runs.config import RunConfig
from zinit.runs.directory import (
    TRAINED,
    Log,
    claimed,
    launch_id,
    read_run,
    save_baseline,
    save_trained,
    was_restarted,
    write_json,
    writing,
)
from zinit.runs.evaluate import controlled, evaluate
from zinit.runs.identity import PLACES, flat_settings, identity_of
from zinit.runs.images import check_encoder, encode_images
from zinit.runs.preview import fit_rates, fit_warmup, picked, settle
from zinit.runs.record import EXAMPLES, RECORD, RESULTS, Record, Results, versions
from zinit.runs.start import WarmStart, check_has_start, check_same_start
from zinit.runs.tracking import Tracked, begin, settings_of
from zinit.train import activation_cache
from zinit.train.best import LOSS, Best
from zinit.train.checkpoint import check_identity, resume_command
from zinit.train.events import Ended, Evaluated, Listener, Notice, Stage, Stopped
from zinit.train.loop import Interrupted, fit, ignore
from zinit.train.plan import Plan, rates_by_role
from zinit.train.strategy import describe, loading_device, make_accelerator, place

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zinit.tasks.base import Task

SAME_MODEL = 0.999  # cosine of two samples of the weights
SEEDS = 2**32 - 2**16  # NumPy takes 32 bits, and every process adds its number


@dataclass(kw_only=True)
class Run:
    """A run that is being made.

    Attributes:
        config: its settings.
        output: its folder.
        resume: whether it goes on from what is there.
        accelerator: its processes.
        built: its model and method.
        task: on the model.
        on_event: gets every event.
        log: writes events to ``log.jsonl`` and passes them on.
        identity: what a resumed run must have in common with the one that saved.
        scaled: what of its preset was scaled, or chosen for its model without one, in words.
        start: the weights it starts from; None are fresh ones.
    """

    config: RunConfig
    output: Path
    resume: bool
    accelerator: Accelerator
    built: Built
    task: Task
    on_event: Listener
    log: Log
    identity: dict[str, Any]
    scaled: list[str]
    start: WarmStart | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @property
    def num_trainable(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.task.parameters() if p.requires_grad)


def train_run(
    config: RunConfig,
    output: str | Path,
    *,
    preset: str | None = None,
    resume: bool = False,
    on_event: Listener = ignore,
) -> dict[str, Any]:
    """Trains and evaluates; the run's directory holds everything.

    Args:
        config: what to run.
        output: a new or empty folder; with ``resume`` one that holds this run.
        preset: its name, for the record; as `zinit.runs.settings.resolve` returns it, it is fitted to a smaller model.
        resume: go on from the last checkpoint. A run that torchrun starts anew (--max-restarts) does so by itself.
        on_event: also gets every event that is logged.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: if the folder already holds something, or another run is going on in it.
        Interrupted: on a signal, after saving.
    """
    output = Path(output)
    resume = resume or was_restarted(output)
    with claimed(output, resume=resume, on_event=on_event):
        run = build(config, output, preset=preset, resume=resume, on_event=on_event)
        preflight(run, preset=preset)
        results = baseline(run)
        best = choose_by(run, results)
        steps, seconds = train(run, best)
        publish(run, results, steps=steps, seconds=seconds, best=best)
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()
        return results.to_dict()


def build(config: RunConfig, output: Path, *, preset: str | None, resume: bool, on_event: Listener) -> Run:
    """The processes, the model and the task of a run. Nothing is written."""
    from accelerate.utils import set_seed

    accelerator = make_accelerator(config.train, **settings_of(config.train.tracker, output))
    settings = {name: value for name, value in flat_settings(config).items() if name not in PLACES}
    agreement.check_agreement(accelerator, {"--output": str(output), "--resume": resume, **settings})
    set_seed(config.seed % SEEDS, device_specific=True)  # for the host's dropout; each process has draws of its own
    check_has_start(config)
    check_encoder(config)
    on_event(Stage(f"loading model and data; {describe(accelerator)}"))
    examples = read_data(config, device=accelerator.device)
    config, notes = settle(config, preset)
    built = build_model(config, accelerator.device, load_to=loading_device(accelerator, offload=config.offload))
    task = build_task(config, built, examples=examples)
    rated, chosen = fit_rates(config, preset, task)
    fitted, more = fit_warmup(rated, preset, task, config.seed)
    for note in (notes := [*notes, *chosen, *more]):
        on_event(Notice(f"{'the preset is scaled to this run' if preset else 'chosen for this model'}: {note}"))
    return Run(
        config=dataclasses.replace(config, train=fitted),
        output=output,
        resume=resume,
        accelerator=accelerator,
        built=built,
        task=task,
        on_event=on_event,
        log=Log(output, accelerator.is_main_process, on_event),
        identity={},
        scaled=notes,
        start=None if config.warm_start is None else WarmStart.read(config.warm_start, task, built.method),
    )


def preflight(run: Run, *, preset: str | None) -> None:
    """Checks that the run can be trained, places it on its devices, and begins its record.

    Raises:
        ConfigError, DataError: if there is nothing to train, or nothing to train on.
        CheckpointError: if the folder holds another run.
    """
    task, accelerator = run.task, run.accelerator
    _check_trainable(run)
    place(task, accelerator, offload=run.config.offload)
    encode_images(task, accelerator, run.on_event if run.is_main else ignore)
    with run.built.adapted.disabled(), weights_in_place(task):
        task.prepare()
    agreement.check_agreement(accelerator, {"the hashes of --from": run.start and run.start.sha256})
    if run.start is not None:
        run.start.copy_to(task)
    run.identity = identity_of(run.config, task.fingerprint())
    agreement.check_agreement(accelerator, {"the hash of the examples": run.identity["examples"]})
    agreement.check_models(accelerator, {**run.built.identities, "the model": run.built.identity})
    if run.resume:
        run.identity = _check_same_run(run)
    accelerator.wait_for_everyone()  # no process begins a record before all have looked whether there is one
    if run.is_main and not run.resume:
        write_json(run.output / RECORD, make_record(run, preset).to_dict())
    if tracker := run.config.train.tracker:
        begin(accelerator, tracker, run.output, flat_settings(run.config))


def _check_trainable(run: Run) -> None:
    """What cannot be trained, planned or stored is refused before anything is computed."""
    config, task = run.config, run.task
    if not len(task.train_stream):
        raise DataError(f"nothing is left to train on: {task.data_report()}.")
    if not any(parameter.requires_grad for parameter in task.parameters()):
        raise ConfigError(
            f"the method {config.method!r} leaves nothing to train: the task {config.task!r} has no head of its own."
        )
    if _takes_steps(run):
        Plan.of(task, config.train, config.seed)
        activation_cache.check(task, config.train, run.accelerator)
    elif useless := [name for name in ("activation_cache", "keep_best") if getattr(config.train, name) is not None]:
        raise ConfigError(f"train.{useless[0]} is of no use to the method {config.method!r}, which takes no steps.")


def _takes_steps(run: Run) -> bool:
    """Whether the loop trains, and not a procedure of the method's own."""
    return type(run.built.method).solve is Method.solve


def make_record(run: Run, preset: str | None) -> Record:
    """What ``run.json`` says of a run."""
    config, task, accelerator = run.config, run.task, run.accelerator
    return Record(
        config=config.to_dict(),
        backbone=config.backbone,
        task=config.task,
        model=config.model or "embedded demo",
        data=", ".join([config.data] if isinstance(config.data, str) else config.data or ["embedded demo"]),
        demo=config.model is None,
        seed=config.seed,
        preset=preset or None,
        scaled=run.scaled,
        method=config.method,
        prefix=None if task.handle is None else task.handle.config.to_dict(),
        labels=task.labels,
        weights=[*(["adapter.json"] if task.handle else []), *([TRAINED] if task.trained() else [])],
        train=config.train.to_dict(),
        fingerprint=run.identity["examples"],
        identity=run.identity,
        key_probe=run.built.key_probe,
        models=run.built.identities,
        counts=task.data_report(),
        num_trainable=run.num_trainable,
        rates=rates_by_role(task, config.train) if _takes_steps(run) else {},
        warm_start={} if run.start is None else run.start.to_dict(),
        processes=accelerator.num_processes,
        strategy=accelerator.distributed_type.value,
        launch=launch_id(),
        device=str(accelerator.device),
        versions=versions(),
    )


def baseline(run: Run) -> Results:
    """Evaluates the base, or reads what it gave before the run was stopped."""
    task, results = run.task, Results.read(run.output) if run.resume else Results()
    if "base" in results.metrics:
        return results
    run.on_event(Stage("evaluating the base model"))
    with run.built.adapted.disabled(), task.frozen_baseline():
        base = evaluate(task, run.config, run.accelerator)
        save_baseline(task, run.output, writes=run.is_main)
    results = Results(
        metrics={"base": base.metrics},
        baseline=task.baseline,
        seed=run.config.seed,
        counts=task.data_report(),
        samples=[{"base" if key == "output" else key: text for key, text in sample.items()} for sample in base.samples],
    )
    run.log(Evaluated(0, base.metrics))
    if run.is_main:
        write_json(run.output / RESULTS, results.to_dict())
    return results


def choose_by(run: Run, results: Results) -> Best | None:
    """What chooses the weights, if ``train.keep_best`` names a figure.

    Args:
        run: before training.
        results: of the base, which have the same figures.

    Raises:
        ConfigError: if it is no figure, or none that has better values.
    """
    metric, task = run.config.train.keep_best, run.task
    if metric is None:
        return None
    figures = [name for name in results.metrics["base"] if task.direction(name)]
    direction = task.direction(metric)
    if metric not in figures or direction is None:
        raise ConfigError(
            f"train.keep_best={metric!r} is none of the figures that this run's evaluation gives. Take one of "
            f"{', '.join(figures) or 'none (nothing is held out)'}, in another folder (--output)."
        )

    def measure() -> Mapping[str, float]:
        return evaluate(task, run.config, run.accelerator).metrics

    figures_by = None if metric == LOSS else measure
    return Best(metric=metric, direction=direction, patience=run.config.train.patience, figures=figures_by)


def train(run: Run, best: Best | None = None) -> tuple[int, float]:
    """Trains, by the method's own procedure or by the loop.

    Args:
        run: what trains.
        best: chooses the weights; None takes the last.

    Returns:
        Optimizer steps done in all, and seconds of this process's part.

    Raises:
        Interrupted: on a signal, after saving.
    """
    task, config, accelerator = run.task, run.config.train, run.accelerator
    started, steps = time.perf_counter(), 0
    listener = Tracked(accelerator, run.log) if config.tracker else run.log
    try:
        if not run.built.method.solve(task):
            run.on_event(Stage(f"training {picked(run.config, task)}"))
            steps = fit(
                task,
                config,
                seed=run.config.seed,
                accelerator=accelerator,
                directory=run.output,
                identity=run.identity,
                resume=run.resume,
                on_event=listener,
                batches=activation_cache.stored_activations(task, config, accelerator, listener),
                best=best,
            )
    except Interrupted as interruption:
        run.log(Stopped(interruption.step))
        _report(run)
        raise
    return steps, time.perf_counter() - started


def publish(run: Run, results: Results, *, steps: int, seconds: float, best: Best | None = None) -> None:
    """Writes the weights, evaluates the adapted model, and writes results and report.

    Args:
        run: after training.
        results: those of the base; completed here.
        steps: optimizer steps done in all.
        seconds: of training.
        best: what has chosen the weights.
    """
    task, output, at = run.task, run.output, steps
    if best is not None and best.value is not None:
        at = best.step
        results.best = {"metric": best.metric, "value": best.value, "step": at}
        run.log(Notice(f"kept the weights of step {at} of {steps}: {best.metric} {best.value:.4f} was the best"))
    # Before the evaluation: nothing that happens there can lose it.
    save_trained(task, output, writes=run.is_main)
    if run.is_main and task.handle is not None:
        _save_adapter(task.handle, output, run.built.key_probe)
    run.on_event(Stage("evaluating the adapted model"))
    adapted = evaluate(task, run.config, run.accelerator)
    results.metrics["adapted"] = adapted.metrics
    results.metrics |= controlled(task, run.config, run.accelerator)
    results.counts |= adapted.counts
    for sample, answered in zip(results.samples, adapted.samples, strict=False):
        sample["adapted"] = answered["output"]
    results.steps, results.seconds, results.num_trainable = steps, round(seconds, 2), run.num_trainable
    if run.is_main:
        for name, artifact in task.artifacts().items():
            write_json(output / name, artifact)
        if adapted.examples:
            write_json(output / EXAMPLES, adapted.examples)
        write_json(output / RESULTS, results.to_dict())
        run.log(Evaluated(at, adapted.metrics))
        run.log(Ended(steps))
        _report(run)
        with writing(output / CARD):
            write_card(output)


def _check_same_run(run: Run) -> dict[str, Any]:
    """Checks that a resumed run is the one that the folder holds, whether or not it has come to a checkpoint yet.

    Returns:
        The identity as the folder has it: an earlier version may have known fewer settings.
    """
    config, record = read_run(run.output)
    check_identity(run.output, identity_of(config, record.identity.get("examples", "")), run.identity)
    check_models(run.output, record, run.built)
    check_same_start(run.output, record.warm_start, run.start)
    before, now = record.key_probe, run.built.key_probe
    if before and now and not cosine(before, now) >= SAME_MODEL:
        raise CheckpointError(
            f"the run in {run.output} cannot go on: the weights of the frozen model are not the ones it started on. "
            f"Restore them, or start a new run in another folder."
        )
    return record.identity


def _save_adapter(handle: Handle, output: Path, key_probe: list[float] | None) -> None:
    """As `Handle.save`; a sharded host cannot be asked for its weights any more, so the sample is handed in."""
    file = handle.to_file()
    sample = file.fingerprint["key_probe"] or key_probe
    try:
        dataclasses.replace(file, fingerprint={**file.fingerprint, "key_probe": sample}).write(output)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Make room, then: {resume_command(output)}") from error


def _report(run: Run) -> None:
    if run.is_main:
        from zinit.runs.report import write_report

        with writing(run.output / "report.html"):
            write_report(run.output)
