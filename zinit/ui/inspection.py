"""What the command ``inspect`` reports."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zinit.adapter.attach import attach
from zinit.backbones import BACKBONES, find_backbone
from zinit.config import AdapterConfig, PrefixConfig, setting_paths
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
    known = [f"prefix.{path}" for path in setting_paths(PrefixConfig)]
    values = parse_options(options, known)
    parts = read_parts(values)
    config = AdapterConfig(parts=parts) if parts else PrefixConfig.from_dict(values.get("prefix", {}))
    if source in BACKBONES and not Path(source).exists():
        source = str(demo_model(source))
    model = load_on_meta(source)
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
