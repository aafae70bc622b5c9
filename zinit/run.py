"""One run: built from its settings, trained, evaluated; its directory holds everything."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter_file import fingerprint, write_atomically
from zinit.attach import Handle, attach, load
from zinit.backbones import BACKBONES
from zinit.config import to_json
from zinit.engine import Event, Interrupted, fit, held_out_loss, make_accelerator
from zinit.errors import CheckpointError, ConfigError, DataError
from zinit.settings import RunConfig
from zinit.tasks import TASKS

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from zinit.tasks.base import Evaluation, Task

INDIFFERENT = ("micro_batch_size", "evaluate_every", "save_every", "workers", "tensorboard")
PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "safetensors")


def build_task(config: RunConfig, device: torch.device, *, adapter: Path | None = None) -> Task:
    """Model, adapter and data of a run, on the CPU.

    Args:
        config: the run's settings.
        device: that it will run on; decides the dtype "auto".
        adapter: a folder to load the adapter from; None attaches a fresh one.
    """
    task_class = TASKS.get(config.task)
    model, processor, handle = build_model(config, device, adapter=adapter)
    return task_class(model, processor, handle, config.options, data=config.data, seed=config.seed)


def build_model(config: RunConfig, device: torch.device, *, adapter: Path | None = None) -> tuple[Any, Any, Handle]:
    """The model with its adapter, and its tokenizer or processor; see `build_task`."""
    import torch

    name = config.dtype
    dtype = (torch.bfloat16 if device.type == "cuda" else torch.float32) if name == "auto" else getattr(torch, name)
    source = demo_model(config.backbone) if config.model is None else config.model
    model, processor = TASKS.get(config.task).load_model(source, dtype=dtype, revision=config.revision)
    if adapter is not None:
        return model, processor, load(model, adapter)
    return model, processor, attach(model, config.prefix, backbone=config.backbone, seed=config.seed)


def demo_model(backbone: str) -> Path:
    """Where the embedded model of a backbone lies.

    Raises:
        ConfigError: if it has none.
    """
    where = BACKBONES.get(backbone).demo_model
    if not where:
        raise ConfigError(f"the backbone {backbone!r} has no embedded demo: pass --model and --data.")
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def read_run(directory: str | Path) -> tuple[RunConfig, dict[str, Any]]:
    """The settings of a run and all of its ``run.json``.

    Raises:
        CheckpointError: if the folder holds no run.
    """
    path = Path(directory) / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no run: there is no run.json. Expected a folder of 'zinit train'.")
    try:
        document = json.loads(path.read_text())
        config = RunConfig.from_dict(document["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    return config, document


def load_run(directory: str | Path, device: torch.device) -> tuple[RunConfig, Any, Any, Handle]:
    """A finished run's settings, model, tokenizer and adapter.

    Raises:
        CheckpointError: if there is no run, or it has no adapter yet.
    """
    config, _ = read_run(directory)
    if not (Path(directory) / "adapter.json").is_file():
        raise CheckpointError(
            f"the run in {directory} has not finished: there is no adapter yet. "
            f"Go on with: zinit train --resume --output {directory}"
        )
    return config, *build_model(config, device, adapter=Path(directory))


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
        resume: go on from the last checkpoint.
        on_event: also gets every event that is logged.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ConfigError: if the folder already holds something.
        Interrupted: on a signal, after saving.
    """
    output = Path(output)
    _check_output(output, resume)
    extra: dict[str, Any] = {}
    if config.train.tensorboard:
        extra = _tensorboard(output)
    accelerator = make_accelerator(config.train, **extra)
    started = time.perf_counter()
    on_event({"event": "stage", "text": "loading model and data"})
    task = build_task(config, accelerator.device)
    if not len(task.train_stream):
        raise DataError(f"nothing is left to train on: {task.data_report()}.")
    task.to(accelerator.device)
    identity = _identity(config, task)
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
        "prefix": config.prefix.to_dict(),
        "train": config.train.to_dict(),
        "fingerprint": identity["examples"],
        "counts": task.data_report(),
        "num_trainable": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "versions": versions(),
    }
    log = _Log(output, accelerator.is_main_process, on_event)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not (resume and (output / "run.json").exists()):
            write_json(output / "run.json", document)
    if config.train.tensorboard:
        accelerator.init_trackers("tensorboard")
    on_event({"event": "stage", "text": "evaluating the frozen model"})
    results = _read_results(output) if resume else {}
    if "frozen" not in results.get("metrics", {}):
        assert task.handle is not None
        with task.handle.disabled():
            frozen = _evaluate(task, config, accelerator)
        results = {"metrics": {"frozen": frozen.metrics}, "seed": config.seed, "counts": task.data_report()}
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

    try:
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
    on_event({"event": "stage", "text": "evaluating the adapted model"})
    adapted = _evaluate(task, config, accelerator)
    results["metrics"]["adapted"] = adapted.metrics
    results["counts"] |= adapted.counts
    for sample, answered in zip(results["samples"], adapted.samples, strict=True):
        sample["adapted"] = answered["output"]
    results |= {"steps": steps, "seconds": round(trained, 2), "num_trainable": document["num_trainable"]}
    if accelerator.is_main_process:
        assert task.handle is not None
        task.handle.save(output)
        write_json(output / "metrics.json", results)
        log({"event": "eval", "step": steps, **adapted.metrics})
        log({"event": "end", "step": steps})
        _report(output, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def evaluate_run(directory: str | Path, *, data: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """Frozen and adapted model of a finished run on its held-out examples, or on other data.

    Args:
        directory: of the run.
        data: evaluate on all of this instead.
        limit: examples an answer is generated for.
    """
    config, _ = read_run(directory)
    if data is not None:
        config = dataclasses.replace(config, options=dataclasses.replace(config.options, held_out_data=data))
    accelerator = make_accelerator(config.train)
    load_run(directory, accelerator.device)  # a clear message if there is no adapter
    task = build_task(config, accelerator.device, adapter=Path(directory))
    task.to(accelerator.device)
    assert task.handle is not None
    with task.handle.disabled():
        frozen = _evaluate(task, config, accelerator, limit)
    adapted = _evaluate(task, config, accelerator, limit)
    return {
        "metrics": {"frozen": frozen.metrics, "adapted": adapted.metrics},
        "counts": {**task.data_report(), **adapted.counts},
        "seed": config.seed,
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON document; it appears whole or not at all."""
    write_atomically(path, to_json(document, indent=2).encode() + b"\n")


def _evaluate(task: Task, config: RunConfig, accelerator: Accelerator, limit: int | None = None) -> Evaluation:
    loss, count = held_out_loss(task, config.train, accelerator)
    evaluation = task.evaluate(accelerator, limit=limit)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    evaluation.metrics = {"loss": loss, "perplexity": perplexity, **evaluation.metrics}
    evaluation.counts = {"held_out_units": count, **evaluation.counts}
    return evaluation


def _identity(config: RunConfig, task: Task) -> dict[str, Any]:
    """What decides the result bit for bit: a resumed run must have all of it in common with the one that saved."""
    train = {name: value for name, value in config.train.to_dict().items() if name not in INDIFFERENT}
    identity = {**config.to_dict(), "train": train, "examples": task.fingerprint()}
    if task.handle is not None:
        identity["model_weights"] = fingerprint(task.model, list(task.handle.attachment.sites.values()))["key_probe"]
    return {key: value for name, item in identity.items() for key, value in _flat(name, item)}


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{name}.{key}", item) for key, item in value.items()]
    return [(name, value)]


def _check_output(output: Path, resume: bool) -> None:
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
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is not writable.")


def _read_results(output: Path) -> dict[str, Any]:
    try:
        return json.loads((output / "metrics.json").read_text())
    except (OSError, ValueError):
        return {}


def _tensorboard(output: Path) -> dict[str, Any]:
    if find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard=true needs the package tensorboard: pip install 'zinit[tensorboard]'.")
    return {"log_with": "tensorboard", "project_dir": str(output)}


def _report(output: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        from zinit.report import write_report

        write_report(output)


class _Log:
    """Appends events to ``log.jsonl`` and passes them on."""

    def __init__(self, output: Path, writes: bool, on_event: Callable[[Event], None]) -> None:
        self.path, self.writes, self.on_event = output / "log.jsonl", writes, on_event

    def __call__(self, event: Event) -> None:
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(event) + "\n")
        self.on_event(event)
