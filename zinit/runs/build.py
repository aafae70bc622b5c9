"""The parts of a run: its model, adapted, and the task on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.adapter.fingerprint import fingerprint
from zinit.adapter.handle import Handle
from zinit.backbones import BACKBONES
from zinit.errors import BackboneError, ConfigError
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext, Method, apply_method
from zinit.models.offload import move
from zinit.registry import import_object
from zinit.runs.directory import read_finished_run
from zinit.runs.settings import RunConfig
from zinit.tasks import TASKS
from zinit.tasks.base import TaskInputs, load_host, make_task

if TYPE_CHECKING:
    import torch

    from zinit.methods.base import Adapted
    from zinit.tasks.base import Task


@dataclass(kw_only=True)
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
    context = ApplyContext(prefix=config.prefix, backbone=config.backbone, seed=config.seed, saved=saved)
    adapted = apply_method(method, model, context)
    return Built(method=method, adapted=adapted, processor=processor, key_probe=key_probe)


def build_task(config: RunConfig, built: Built, *, labels: list[str] | None = None, train: bool = True) -> Task:
    """The task on a built model.

    Args:
        config: the run's settings.
        built: see `build_model`.
        labels: class names of a finished run.
        train: False leaves the training examples unread.
    """
    inputs = TaskInputs(
        model=built.adapted.model,
        processor=built.processor,
        handle=built.adapted.handle,
        data=config.data,
        seed=config.seed,
        train=train,
        labels=labels,
    )
    return make_task(TASKS.get(config.task), inputs, config.options)


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
