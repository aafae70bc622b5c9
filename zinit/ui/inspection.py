"""What the command ``inspect`` reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.backbones import BACKBONES, find_backbone
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.models.estimate import estimate_step, measure_rates
from zinit.models.loading import load_on_meta
from zinit.runs.build import demo_model
from zinit.runs.config import CONTEXT, DEFAULT_METHOD, PARTS, RunConfig
from zinit.runs.options import run_overrides
from zinit.validation import shown

ANY_TASK = "alpaca"  # a run has one; what goes into the model does not depend on it
OF_MODEL = {"prefix", "method", "tuning", PARTS, CONTEXT}  # tables of settings that say what goes into a model


def inspect_model(source: str, *, backbone: str | None = None, options: Iterable[str] = ()) -> dict[str, Any]:
    """The attention modules of a model and what a method would train; on the meta device, without weights.

    Args:
        source: folder, Hub id, or a backbone's name for its embedded demo.
        backbone: registered name.
        options: ``prefix.length=20``, ``method=lora``, ``method.rank=4`` and the like.
    """
    model = _on_meta(source)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    known = BACKBONES.get(backbone) if backbone else find_backbone(model)
    method, config = _asked(options, known.name)
    sites = known.sites(model)
    adapted, attached = _apply(method, config, model), method.attached(config.adapter())
    num_trainable = sum(parameter.numel() for parameter in _trained(adapted.model))
    own = [] if adapted.handle is None else adapted.handle.sites
    return {
        "class": type(model).__name__,
        "backbone": known.name,
        "method": config.method,
        "num_parameters": num_parameters,
        "num_trainable": num_trainable,
        "file_bytes": 4 * num_trainable,
        "prefix": None if attached is None else attached.simplest().to_dict(),
        "sites": [{"name": s.name, **s.shape(), "adapted": s in own} for s in sites],
    }


def estimate_training(
    source: str, *, backbone: str | None = None, options: Iterable[str] = (), batch: int = 8, length: int = 256
) -> dict[str, Any]:
    """Memory and time of a method's training step, before a weight is loaded; see `zinit.models.estimate`.

    Args:
        source: see `inspect_model`.
        backbone: likewise.
        options: likewise.
        batch: examples of a forward pass.
        length: tokens of each.

    Returns:
        Bytes by what they hold and at the peak, "seconds" of a step, and the measured rates these come from.

    Raises:
        ConfigError: if the method trains nothing in the model, or puts it into another, whose step is not counted.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    model = _on_meta(source)
    method, config = _asked(options, backbone or find_backbone(model).name)
    half = device.type == "cuda" and not method.trains_host
    dtype = torch.bfloat16 if half else torch.float32  # as a run's dtype "auto"
    if _apply(method, config, model.to(dtype)).model is not model:
        raise ConfigError(
            f"a step of {config.method!r} cannot be estimated: it puts the model into another, and what that computes "
            f"is not counted."
        )
    if not (trained := _trained(model)):
        raise ConfigError(f"the method {config.method!r} trains nothing in the model, so there is no step to estimate.")
    rates = measure_rates(device, dtype)
    found = estimate_step(model, trained, batch=batch, length=length, rates=rates)
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "length": length,
        "weights_bytes": found.weights,
        "adapter_bytes": found.adapter,
        "activations_bytes": found.activations,
        "peak_bytes": found.peak,
        "flops": found.flops,
        "seconds": found.seconds,
        "rates": {"flops": rates.flops, "bytes": rates.bandwidth},
    }


def describe_training(found: dict[str, Any]) -> str:
    """What `estimate_training` found, in words.

    Args:
        found: by it.
    """
    sizes = {name: found[f"{name}_bytes"] / 1e9 for name in ("weights", "adapter", "activations", "peak")}
    return (
        f"a step of {found['batch']} x {found['length']} tokens on {found['device']} in {found['dtype']}, estimated: "
        f"{sizes['peak']:.2f} GB (frozen weights {sizes['weights']:.2f}, what trains with gradients and moments "
        f"{sizes['adapter']:.3f}, activations {sizes['activations']:.2f}), {found['seconds']:.2g} s"
    )


def _asked(options: Iterable[str], backbone: str) -> tuple[Method, RunConfig]:
    """The method, and the run's settings, as ``zinit train`` would read them."""
    values = run_overrides(options, task=ANY_TASK, method=DEFAULT_METHOD)
    if foreign := sorted(values.keys() - OF_MODEL):
        raise ConfigError(
            f"the setting {shown(foreign[0])} says nothing about what goes into a model; there are: "
            f"{', '.join(sorted(OF_MODEL))}."
        )
    config = RunConfig.from_dict({"backbone": backbone, "task": {"name": ANY_TASK}, **values})
    return METHODS.get(config.method)(config.method_options), config


def _apply(method: Method, config: RunConfig, model: nn.Module) -> Adapted:
    context = ApplyContext(prefix=config.prefix, adapter=config.adapter(), backbone=config.backbone, seed=0)
    return method.apply(model, context)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _on_meta(source: str) -> Any:
    is_demo = source in BACKBONES and not Path(source).exists()
    return load_on_meta(str(demo_model(source)) if is_demo else source)
