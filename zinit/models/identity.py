"""What tells one pretrained model from another, whatever its architecture: a kind, a size, a sample of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zinit.compat import is_shard
from zinit.models.quantization import quantized_weights

TENSORS = 32  # how many of a model's tensors are sampled
VALUES = 4  # numbers of each
TOLERANCE = 0.01  # relative: the same weights in bfloat16 differ by at most 0.004


@torch.no_grad()
def identify(model: nn.Module) -> dict[str, Any]:
    """A model's fingerprint, as JSON: ``type``, ``parameters`` (their number) and ``weights`` (a sample by name).

    Quantised weights, and those that are sharded or not loaded, are left out of the sample.
    """
    quantized = set(quantized_weights(model))
    candidates = {
        name: parameter
        for name, parameter in sorted(model.named_parameters())
        if name not in quantized and not parameter.is_meta and not is_shard(parameter) and parameter.numel()
    }
    config = getattr(model, "config", None)
    return {
        "type": getattr(config, "model_type", type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": {name: _sample(candidates[name]) for name in _spread(list(candidates), TENSORS)},
    }


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spread."""
    return items if len(items) <= count else [items[index * len(items) // count] for index in range(count)]


def _sample(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    count = min(VALUES, flat.numel())
    places = torch.tensor([index * flat.numel() // count for index in range(count)], device=flat.device)
    return [float(f"{value:.6g}") for value in flat[places].float().tolist()]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two fingerprints of `identify`, in words; None if nothing does."""
    for field in ("type", "parameters"):
        if before.get(field) != now.get(field):
            return f"{field} is {now.get(field)!r}, expected {before.get(field)!r}"
    ours, theirs = now.get("weights", {}), before.get("weights", {})
    if ours.keys() != theirs.keys():
        name = sorted(ours.keys() ^ theirs.keys())[0]
        return f"weights: {name} is in only one of the two"
    for name, values in ours.items():
        if not _close(values, theirs[name]):
            return f"weights: {name} begins {values[:2]}, expected {theirs[name][:2]}"
    return None


def _close(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) == len(theirs) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in zip(ours, theirs, strict=True)
    )
