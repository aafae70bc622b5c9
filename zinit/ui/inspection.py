"""What the command ``inspect`` reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from zinit.adapter.attach import attach
from zinit.backbones import BACKBONES, find_backbone
from zinit.config import AdapterConfig, PrefixConfig, setting_paths
from zinit.models.estimate import estimate_step, measure_rates
from zinit.models.loading import load_on_meta
from zinit.runs.build import demo_model
from zinit.runs.config import read_parts
from zinit.runs.options import parse_options


def inspect_model(source: str, *, backbone: str | None = None, options: Iterable[str] = ()) -> dict[str, Any]:
    """The attention modules of a model and what a prefix would train; on the meta device, without weights.

    Args:
        source: folder, Hub id, or a backbone's name for its embedded demo.
        backbone: registered name.
        options: ``prefix.length=20`` and the like.
    """
    config = _adapter(options)
    model = _on_meta(source)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    known = BACKBONES.get(backbone) if backbone else find_backbone(model)
    sites = known.sites(model)
    handle = attach(model, config, backbone=backbone)
    return {
        "class": type(model).__name__,
        "backbone": known.name,
        "num_parameters": num_parameters,
        "num_trainable": handle.num_trainable,
        "file_bytes": 4 * handle.num_trainable,
        "prefix": config.to_dict(),
        "sites": [{"name": s.name, **s.shape(), "adapted": s in handle.sites} for s in sites],
    }


def estimate_training(
    source: str, *, backbone: str | None = None, options: Iterable[str] = (), batch: int = 8, length: int = 256
) -> dict[str, Any]:
    """Memory and time of a training step of the adapter, before a weight is loaded; see `zinit.models.estimate`.

    Args:
        source: see `inspect_model`.
        backbone: likewise.
        options: likewise.
        batch: examples of a forward pass.
        length: tokens of each.

    Returns:
        Bytes by what they hold and at the peak, "seconds" of a step, and the measured rates these come from.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as a run's dtype "auto"
    model = _on_meta(source).to(dtype)
    handle = attach(model, _adapter(options), backbone=backbone)
    rates = measure_rates(device, dtype)
    found = estimate_step(model, list(handle.parameters()), batch=batch, length=length, rates=rates)
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
        f"{sizes['peak']:.2f} GB (weights {sizes['weights']:.2f}, adapter with gradients and moments "
        f"{sizes['adapter']:.3f}, activations {sizes['activations']:.2f}), {found['seconds']:.2g} s"
    )


def _adapter(options: Iterable[str]) -> AdapterConfig | PrefixConfig:
    known = [f"prefix.{path}" for path in setting_paths(PrefixConfig)]
    values = parse_options(options, known)
    parts = read_parts(values)
    return AdapterConfig(parts=parts) if parts else PrefixConfig.from_dict(values.get("prefix", {}))


def _on_meta(source: str) -> Any:
    is_demo = source in BACKBONES and not Path(source).exists()
    return load_on_meta(str(demo_model(source)) if is_demo else source)
