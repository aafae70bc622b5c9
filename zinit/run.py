"""One run: built from its settings, trained, evaluated; its directory holds everything."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter_file import cosine, fingerprint, write_atomically
from zinit.attach import Handle, attach, load
from zinit.backbones import BACKBONES
from zinit.checkpoint import check_identity
from zinit.config import to_json
from zinit.engine import Event, Interrupted, fit, held_out_loss, make_accelerator
from zinit.errors import CheckpointError, ConfigError, DataError
from zinit.settings import SECTIONS, RunConfig, absolute_path
from zinit.tasks import TASKS

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from zinit.tasks.base import Evaluation, Task

# Settings that a resumed run may change. (Other micro-batches sum in another order: the same result but for rounding.)
# Where model and data lie is indifferent too: what is in them is compared.
INDIFFERENT = (
    *(f"train.{name}" for name in ("micro_batch_size", "evaluate_every", "save_every", "workers", "tensorboard")),
    *("model", "data", "task.held_out_data", "task.evaluation_limit"),
)
SAME_MODEL = 0.999  # cosine of two samples of the weights
PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "evaluate", "safetensors")


def build_task(config: RunConfig, device: torch.device, *, adapter: Path | None = None, train: bool = True) -> Task:
    """Model, adapter and data of a run, on the CPU.

    Args:
        config: the run's settings.
        device: that it will run on; decides the dtype "auto".
        adapter: a folder to load the adapter from; None attaches a fresh one.
        train: False leaves the training examples unread.
    """
    task_class = TASKS.get(config.task)
    model, processor, handle = build_model(config, device, adapter=adapter)
    return task_class(model, processor, handle, config.options, data=config.data, seed=config.seed, train=train)


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
        document = json.loads(path.read_text(encoding="utf-8"))
        config = RunConfig.from_dict(document["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    return config, document


def load_run(directory: str | Path, device: torch.device) -> tuple[RunConfig, Any, Any, Handle]:
    """A finished run's settings, model, tokenizer and adapter.

    Raises:
        CheckpointError: if there is no run, or it has no adapter yet.
    """
    config = read_finished_run(directory)
    return config, *build_model(config, device, adapter=Path(directory))


def read_finished_run(directory: str | Path) -> RunConfig:
    """The settings of a run that has an adapter.

    Raises:
        CheckpointError: if there is no run, or it has no adapter yet.
    """
    config, _ = read_run(directory)
    if not (Path(directory) / "adapter.json").is_file():
        raise CheckpointError(
            f"the run in {directory} has not finished: there is no adapter yet. "
            f"Go on with: zinit train --resume --output {directory}"
        )
    return config


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
    from accelerate.utils import set_seed

    set_seed(config.seed, device_specific=True)  # for the host's dropout; each process has draws of its own
    on_event({"event": "stage", "text": "loading model and data"})
    task = build_task(config, accelerator.device)
    if not len(task.train_stream):
        raise DataError(f"nothing is left to train on: {task.data_report()}.")
    task.to(accelerator.device)
    identity, key_probe = _identity(config, task), _key_probe(task)
    if resume:
        _check_same_run(output, identity, key_probe)
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
        "identity": identity,
        "key_probe": key_probe,
        "counts": task.data_report(),
        "num_trainable": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "versions": versions(),
    }
    log = _Log(output, accelerator.is_main_process, on_event)
    if accelerator.is_main_process:
        with _writing(output):
            output.mkdir(parents=True, exist_ok=True)
        if not (resume and (output / "run.json").exists()):
            write_json(output / "run.json", document)
    if config.train.tensorboard:
        accelerator.init_trackers("tensorboard")
    results = _read_results(output) if resume else {}
    if "frozen" not in results.get("metrics", {}):
        on_event({"event": "stage", "text": "evaluating the frozen model"})
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

    started = time.perf_counter()
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
    if accelerator.is_main_process:
        assert task.handle is not None
        task.handle.save(output)  # before the evaluation: nothing that happens there can lose it
    on_event({"event": "stage", "text": "evaluating the adapted model"})
    adapted = _evaluate(task, config, accelerator)
    results["metrics"]["adapted"] = adapted.metrics
    results["counts"] |= adapted.counts
    for sample, answered in zip(results["samples"], adapted.samples, strict=False):
        sample["adapted"] = answered["output"]
    results |= {"steps": steps, "seconds": round(trained, 2), "num_trainable": document["num_trainable"]}
    if accelerator.is_main_process:
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
    config = read_finished_run(directory)
    if data is not None:
        options = dataclasses.replace(config.options, held_out_data=absolute_path(data))
        config = dataclasses.replace(config, options=options)
    accelerator = make_accelerator(config.train)
    task = build_task(config, accelerator.device, adapter=Path(directory), train=data is None)
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
    with _writing(path):
        write_atomically(path, to_json(document, indent=2).encode() + b"\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk or a read-only folder is the user's to mend, not a fault of ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Make room, then: "
            f"zinit train --resume --output {path.parent}"
        ) from error


def _evaluate(task: Task, config: RunConfig, accelerator: Accelerator, limit: int | None = None) -> Evaluation:
    loss, count = held_out_loss(task, config.train, accelerator)
    with accelerator.autocast():
        evaluation = task.evaluate(accelerator, limit=limit)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    evaluation.metrics = {"loss": loss, "perplexity": perplexity, **evaluation.metrics}
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


def _key_probe(task: Task) -> list[float] | None:
    """A sample of the frozen model's weights."""
    if task.handle is None:
        return None
    return fingerprint(task.model, list(task.handle.attachment.sites.values()))["key_probe"]


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
    if not parent.is_dir():
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"the output folder {output} cannot be made: {parent} is not writable.")


def _read_results(output: Path) -> dict[str, Any]:
    try:
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _tensorboard(output: Path) -> dict[str, Any]:
    if find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard=true needs the package tensorboard: pip install 'zinit[tensorboard]'.")
    return {"log_with": "tensorboard", "project_dir": str(output)}


def _report(output: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        from zinit.report import write_report

        with _writing(output / "report.html"):
            write_report(output)


class _Log:
    """Appends events to ``log.jsonl`` and passes them on."""

    def __init__(self, output: Path, writes: bool, on_event: Callable[[Event], None]) -> None:
        self.path, self.writes, self.on_event = output / "log.jsonl", writes, on_event
        if writes and self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:  # a kill tore the last line: it must not take the next
                file.write("\n")

    def __call__(self, event: Event) -> None:
        if self.writes:
            with _writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(event) + "\n")
        self.on_event(event)
