"""Converts an adapter from one format into another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zinit.adapter.file import AdapterFile
from zinit.adapter.handle import Handle
from zinit.adapter.registries import FORMATS
from zinit.errors import ConfigError
from zinit.interop.base import Gate
from zinit.interop.importing import active_handle, attach_tensors, handles_on, import_adapter
from zinit.registry import did_you_mean

OWN = "zinit"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    source_format: str,
    target_format: str,
    model: nn.Module | str | Path | None = None,
    length: int = 10,
    gate: Gate = "tanh",
    force: bool = False,
    **options: Any,
) -> Handle:
    """Reads an adapter in one format and writes it in another; "zinit" is a format too.

    A conversion needs the model: its layers, and whether the target's reader computes the same with it. The config is
    enough, except for LitGPT's newer files, whose keys and values are computed with the weights. Given a folder or id,
    weights are read only if they are needed; a file in zinit's own format then holds no sample to recognize them by.

    Args:
        source: the file or folder to read.
        destination: the file or folder to write.
        source_format: a format of `FORMATS`, or "zinit".
        target_format: "zinit", or a format that is written, see ``zinit ls formats``.
        model: the model, or a folder or Hub id of one. Default: the one that a source in zinit's format names.
        length: see `import_adapter`.
        gate: see `import_adapter`.
        force: overwrite an existing destination.
        options: see `zinit.interop.base.Format.export`; "zinit" takes ``tables``, see `zinit.Handle.save`.

    Returns:
        The converted adapter, detached again: look at its ``num_trainable`` and ``prefixes``.

    Raises:
        CheckpointError: if the source cannot be read, or the target format cannot express it.
        ConfigError: if a setting is impossible, the model is unknown, or the destination exists.
    """
    _check_arguments(source_format, target_format, destination, force=force)
    for option in options.keys() - {"tables"} if target_format == OWN else ():
        raise ConfigError(f"the format {OWN!r} has no option {option!r}.{did_you_mean(option, ['tables'])}")
    file = AdapterFile.read(source) if source_format == OWN else None
    model = _find_model(model, file, source_format)
    with _unused_name(model) as name:
        if file is None:
            handle = import_adapter(model, source, format=source_format, length=length, gate=gate, name=name)
        else:
            file.check_model(model)
            handle = attach_tensors(model, file.config, file.tensors, name=name, backbone=file.backbone)
        if target_format == OWN:
            handle.save(destination, **options)
        else:
            handle.export(destination, format=target_format, **options)
    return handle


def _check_arguments(source_format: str, target_format: str, destination: str | Path, *, force: bool) -> None:
    for chosen in (source_format, target_format):
        if chosen != OWN and chosen not in FORMATS:
            raise ConfigError(f"no adapter format named {chosen!r}.{did_you_mean(chosen, [OWN, *FORMATS])}")
    if os.path.exists(destination) and not force:
        raise ConfigError(f"{destination} exists already. Choose another destination, or pass force to overwrite it.")


def _find_model(model: nn.Module | str | Path | None, file: AdapterFile | None, source_format: str) -> nn.Module:
    """The model itself, loaded if only its name is known; a source in zinit's own format may hold the name."""
    if model is None and file is not None:
        model = file.fingerprint.get("name_or_path") or None
    if model is None:
        raise ConfigError(
            f"converting from {source_format!r} needs the model that the adapter was made for: pass its folder or id."
        )
    if isinstance(model, nn.Module):
        return model
    return _causal_lm(str(model), weights=source_format != OWN and FORMATS.get(source_format).needs_weights)


@contextmanager
def _unused_name(model: nn.Module) -> Iterator[str]:
    """An unused adapter name; on leaving, an adapter of that name is detached and the active one restored."""
    before = active_handle(model)
    name = "converted"
    while name in handles_on(model):
        name += "_"
    try:
        yield name
    finally:
        if name in handles_on(model):
            handles_on(model)[name].detach()
            if before is not None:
                before.activate()


def _causal_lm(source: str, *, weights: bool) -> nn.Module:
    """A language model, with its weights or on the meta device."""
    import torch

    from zinit.models.loading import load_causal_lm, load_on_meta

    return load_causal_lm(source, dtype=torch.float32, tokenizer=False)[0] if weights else load_on_meta(source)
