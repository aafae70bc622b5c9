"""What the commands ``inspect`` and ``doctor`` report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.adapter.attach import attach
from zinit.adapter.file import AdapterFile
from zinit.backbones import BACKBONES, find_backbone
from zinit.config import AdapterConfig, PrefixConfig, setting_paths
from zinit.errors import ZinitError, install_extra
from zinit.models.loading import load_on_meta
from zinit.runs.build import build_model, build_task, demo_model
from zinit.runs.config import read_parts
from zinit.runs.options import parse_options
from zinit.runs.record import versions
from zinit.runs.settings import resolve


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


def examine() -> dict[str, Any]:
    """The state of this machine: {"found": {...}, "problems": [...]}."""
    found: dict[str, Any] = dict(versions())
    problems: list[str] = []
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found["device"] = f"{torch.accelerator.device_count()} x {accelerator}" if accelerator else "cpu"
    found["cpu threads"] = torch.get_num_threads()
    found["free disk"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB"
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "online"
    found["tensorboard"] = "installed" if find_spec("tensorboard") else f"not installed. {install_extra('tensorboard')}"
    for name in BACKBONES:
        try:
            if BACKBONES.get(name).demo_model:
                found[f"demo {name}"] = _self_test(name)
        except Exception as error:  # whatever it is, it is reported
            found[f"demo {name}"] = "broken"
            problems.append(f"demo {name}: {type(error).__name__}: {error}")
    return {"found": found, "problems": problems}


@torch.no_grad()
def _self_test(backbone: str) -> str:
    """A closed gate changes nothing, an open one does, and an adapter survives saving."""
    config, _ = resolve(backbone=backbone, seed=0)
    built = build_model(config, torch.device("cpu"))
    task = build_task(config, built).eval()
    handle = built.adapted.handle
    assert handle is not None
    head = getattr(task, "head", None)
    if isinstance(head, nn.Linear):  # a head that starts at zero would hide every change
        head.reset_parameters()
    batch = task.collate(task.held_out_stream, [0, 1])
    with handle.disabled():
        before = task(batch)
    if not torch.equal(task(batch), before):
        raise ZinitError("a closed gate changed the loss")
    for prefix in handle.prefixes.values():
        prefix.gate.fill_(0.5)
    after = task(batch)
    if torch.equal(after, before):
        raise ZinitError("an open gate changed nothing")
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        AdapterFile.read(folder).check_model(handle.model)
    return f"closed gate exact, open gates change the loss of two examples from {before:.2f} to {after:.2f}"
