"""Converts an adapter from one format into another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from zinit.adapter.file import AdapterFile
from zinit.adapter.formats import FORMATS
from zinit.adapter.handle import Handle
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
    """Reads an adapter in one format and writes it in another; "zinit" is a format as well.

    Every conversion needs to know the model: which layers it has, and whether the other side means the same by it. Its
    config is enough, except for LitGPT's newer files, whose keys and values are made with its weights. (Given an id, no
    weights are read unless they are needed; zinit's own file then holds no sample of them to check a model by.)

    Args:
        source: the file or folder to read.
        destination: the file or folder to write.
        source_format: a format of `FORMATS`, or "zinit".
        target_format: "zinit", "official-v1" or "peft".
        model: the model, or a folder or Hub id of one. Default: the one named in a source of zinit's.
        length: see `import_adapter`.
        gate: see `import_adapter`.
        force: write although the destination exists.
        options: see `zinit.interop.base.Format.export`.

    Returns:
        What was converted, off the model again: look at its ``num_trainable`` and ``prefixes``.

    Raises:
        CheckpointError: if the source cannot be read, or the target format cannot express it.
        ConfigError: if a setting is impossible, the model cannot be had, or the destination exists.
    """
    for chosen in (source_format, target_format):
        if chosen != OWN and chosen not in FORMATS:
            raise ConfigError(f"no adapter format named {chosen!r}.{did_you_mean(chosen, [OWN, *FORMATS])}")
    if Path(destination).exists() and not force:
        raise ConfigError(f"{destination} exists already. Choose another destination, or pass force to overwrite it.")
    file = None
    if source_format == OWN:
        file = AdapterFile.read(source)
        model = file.fingerprint.get("name_or_path") or None if model is None else model
    if model is None:
        raise ConfigError(
            f"converting from {source_format!r} needs the model that the adapter was made for: pass its folder or id."
        )
    if isinstance(model, str | Path):
        model = _causal_lm(str(model), weights=source_format != OWN and FORMATS.get(source_format).needs_weights)
    with _unused_name(model) as name:
        if file is None:
            handle = import_adapter(model, source, format=source_format, length=length, gate=gate, name=name)
        else:
            file.check_model(model)
            handle = attach_tensors(model, file.config, file.tensors, name=name, backbone=file.backbone)
        if target_format == OWN:
            handle.save(destination)
        else:
            handle.export(destination, format=target_format, **options)
    return handle


@contextmanager
def _unused_name(model: nn.Module) -> Iterator[str]:
    """A name for an adapter that is on the model only while inside; afterwards the model is as before."""
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
    """A language model, with its weights or as a shape without storage."""
    import torch

    from zinit.models.loading import load_causal_lm, load_on_meta

    return load_causal_lm(source, dtype=torch.float32, tokenizer=False)[0] if weights else load_on_meta(source)
