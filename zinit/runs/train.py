"""One run: built from its settings, trained, evaluated; its directory holds everything."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.file import AdapterFile
from zinit.adapter.fingerprint import cosine, fingerprint
from zinit.adapter.handle import Handle
from zinit.backbones import BACKBONES
from zinit.errors import BackboneError, CheckpointError, ConfigError, DataError
from zinit.methods import METHODS
from zinit.methods.base import Method
from zinit.models.offload import move, weights_in_place
from zinit.registry import import_object
from zinit.runs.directory import (
    TRAINED,
    Log,
    check_output,
    launch_id,
    load_baseline,
    load_trained,
    read_finished_run,
    read_results,
    read_run,
    save_baseline,
    save_trained,
    was_restarted,
    write_json,
    writing,
)
from zinit.runs.settings import SECTIONS, RunConfig, absolute_path
from zinit.tasks import TASKS
from zinit.tasks.base import load_host
from zinit.train import activation_cache
from zinit.train.checkpoint import check_identity
from zinit.train.loop import Event, Interrupted, Plan, fit, held_out_loss
from zinit.train.strategy import in_words, loading_device, make_accelerator, place

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from zinit.methods.base import Adapted
    from zinit.tasks.base import Evaluation, Task

# Settings that a resumed run may change. (Other micro-batches sum in another order: the same result but for rounding.)
# Where model and data lie is indifferent too: what is in them is compared.
INDIFFERENT = (
    *(f"train.{name}" for name in ("micro_batch_size", "micro_batch_tokens", "evaluate_every", "save_every")),
    *("train.workers", "train.tensorboard", "train.trunk_cache", "task.packing"),
    *("model", "data", "task.held_out_data", "task.evaluation_limit", "offload"),
)
SAME_MODEL = 0.999  # cosine of two samples of the weights
PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "safetensors")


@dataclasses.dataclass(kw_only=True)
class Built:
    """A run's parts.

    Attributes:
        method: how the model is adapted.
        adapted: the model with what the method added.
        processor: its tokenizer or the like.
        key_probe: a sample of the frozen model's weights; None for a model that no backbone knows.
    """

    method: Method
    adapted: Adapted
    processor: Any
    key_probe: list[float] | None


def build_model(
    config: RunConfig, device: torch.device, *, load_to: torch.device | str | None = None, saved: Path | None = None
) -> Built:
    """The model, adapted.

    Args:
        config: the run's settings.
        device: that it will run on; decides the dtype "auto".
        load_to: where its weights are read to; default: ``device``.
        saved: a finished run's folder to load the prefix from; None attaches a fresh one.
    """
    import torch

    method: Method = METHODS.get(config.method)(config.method_options)
    name = config.dtype
    low = device.type == "cuda" and not method.trains_host
    dtype = (torch.bfloat16 if low else torch.float32) if name == "auto" else getattr(torch, name)
    source = demo_model(config.backbone) if config.model is None else config.model
    loading = {"dtype": dtype, "revision": config.revision, "device": load_to or device, "quantize": config.quantize}
    model, processor = load_host(TASKS.get(config.task), source, trains=method.trains_host, **loading)
    try:
        key_probe = fingerprint(model, BACKBONES.get(config.backbone).sites(model))["key_probe"]
    except BackboneError:
        key_probe = None  # a method without attention sites may still be used
    adapted = method.apply(model, prefix=config.prefix, backbone=config.backbone, seed=config.seed, saved=saved)
    return Built(method=method, adapted=adapted, processor=processor, key_probe=key_probe)


def build_task(config: RunConfig, built: Built, *, labels: list[str] | None = None, train: bool = True) -> Task:
    """The task on a built model.

    Args:
        config: the run's settings.
        built: see `build_model`.
        labels: class names of a finished run.
        train: False leaves the training examples unread.
    """
    task_class = TASKS.get(config.task)
    known = {} if labels is None else {"labels": labels}
    return task_class(
        built.adapted.model,
        built.processor,
        built.adapted.handle,
        config.options,
        data=config.data,
        seed=config.seed,
        train=train,
        **known,
    )


def demo_model(backbone: str) -> Path:
    """Where the embedded model of a backbone lies.

    Raises:
        ConfigError: if it has none.
    """
    where = BACKBONES.get(backbone).demo_model
    if not where:
        raise ConfigError(f"the backbone {backbone!r} has no embedded demo: pass --model and --data.")
    return import_object(where)()


def load_run(directory: str | Path, device: torch.device) -> tuple[RunConfig, Any, Any, Handle]:
    """A finished run's settings, model (where it runs), tokenizer and prefix.

    Raises:
        CheckpointError: if there is no run, or it has no adapter yet.
        ConfigError: if its method has no prefix.
    """
    config, _ = read_finished_run(directory)
    if not (Path(directory) / "adapter.json").is_file():
        raise ConfigError(
            f"the run in {directory} was made by the method {config.method!r}, which has no prefix. "
            f"Only runs with a prefix can chat and generate; 'zinit eval' takes any."
        )
    built = build_model(config, device, load_to="cpu" if config.offload else device, saved=Path(directory))
    assert built.adapted.handle is not None
    move(built.adapted.model, device, offload=config.offload)
    return config, built.adapted.model, built.processor, built.adapted.handle


def versions() -> dict[str, str]:
    """Python and the libraries a result depends on."""
    import zinit

    return {
        "zinit": zinit.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


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
        _check_same_run(output, identity, built.key_probe)
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
            frozen = _evaluate(task, config, accelerator)
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
    adapted = _evaluate(task, config, accelerator)
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


def evaluate_run(directory: str | Path, *, data: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Frozen and adapted model of a finished run on its held-out examples, or on other data.

    The frozen model is left out where its baseline needs training data that are not read, and the run kept none.

    Args:
        directory: of the run.
        data: evaluate on all of this instead.
        limit: examples an answer is generated for.
    """
    config, document = read_finished_run(directory)
    if data is not None:
        options = dataclasses.replace(config.options, held_out_data=absolute_path(data))
        config = dataclasses.replace(config, options=options)
    accelerator = make_accelerator(config.train)
    load_to = loading_device(accelerator, offload=config.offload)
    built = build_model(config, accelerator.device, load_to=load_to, saved=Path(directory))
    task = build_task(config, built, labels=document.get("labels"), train=data is None)
    place(task, accelerator, offload=config.offload)
    metrics = {}
    kept = load_baseline(task, Path(directory))
    if known := kept or data is None or not task.baseline_parameters():
        with built.adapted.disabled(), nullcontext() if kept else task.frozen_baseline():
            metrics["frozen"] = _evaluate(task, config, accelerator, limit).metrics
    load_trained(task, Path(directory))  # not before: the frozen model is without them
    adapted = _evaluate(task, config, accelerator, limit)
    return {
        "metrics": metrics | {"adapted": adapted.metrics},
        "baseline": task.baseline if known else f"left out, as the run has not kept what it takes: {task.baseline}",
        "counts": {**task.data_report(), **adapted.counts},
        "seed": config.seed,
    }


def _evaluate(task: Task, config: RunConfig, accelerator: Accelerator, limit: int | None = None) -> Evaluation:
    with weights_in_place(task):
        loss, count = held_out_loss(task, config.train, accelerator)
    with accelerator.autocast(), weights_in_place(task):
        evaluation = task.evaluate(accelerator, limit=limit)
    of_text = {"perplexity": math.exp(loss) if loss < 700 else math.inf} if task.generates else {}
    evaluation.metrics = {"loss": loss, **of_text, **evaluation.metrics}
    evaluation.counts = {"held_out_units": count, **evaluation.counts}
    return evaluation


def _identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What decides the result bit for bit: a resumed run must have all of it in common with the one that saved."""
    settings = config.to_dict()
    tables = {section: settings.pop(section) for section in SECTIONS}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {
        name: value
        for name, value in {**settings, **flat, "examples": task.fingerprint()}.items()
        if name not in INDIFFERENT
    }


def _check_same_run(output: Path, identity: dict[str, Any], key_probe: list[float] | None) -> None:
    """A resumed run is the one that the folder holds, whether or not it has come to a checkpoint yet."""
    _, document = read_run(output)
    check_identity(output, document.get("identity", {}), identity)
    before = document.get("key_probe")
    if before and key_probe and not cosine(before, key_probe) >= SAME_MODEL:
        raise CheckpointError(
            f"the run in {output} cannot go on: the weights of the frozen model are not the ones it started on. "
            f"Restore them, or start a new run in another folder."
        )


def _save_adapter(handle: Handle, output: Path, key_probe: list[float] | None) -> None:
    """As `Handle.save`; a sharded host cannot be asked for its weights any more, so the sample is handed in."""
    file = AdapterFile.of(handle)
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
