"""Other people's checkpoint formats: import, export, convert."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinit.errors import CheckpointError, ConfigError
from zinit.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zinit.attach import Handle
    from zinit.config import PrefixConfig
    from zinit.interop._layers import Format, Gate

FORMATS = Registry(
    "adapter format",
    {
        "official-v1": "zinit.interop.official:OFFICIAL_V1",
        "peft": "zinit.interop.peft:PEFT",
        "litgpt": "zinit.interop.litgpt:LITGPT",
        "litgpt-legacy": "zinit.interop.litgpt:LITGPT_LEGACY",
    },
)
OWN = "zinit"


def import_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "official-v1",
    length: int = 10,
    gate: Gate = "tanh",
    name: str = "default",
) -> Handle:
    """Attaches an adapter that another implementation trained. If anything is wrong the model is unchanged.

    Args:
        model: the model it was made for.
        path: the file ("official-v1", "litgpt", "litgpt-legacy") or folder ("peft").
        format: whose it is. LitGPT's files are "litgpt" since its version 0.5.5 and "litgpt-legacy" before; a file
            cannot tell which.
        length: K. Only "official-v1" needs it: its file holds K x L rows and neither factor.
        gate: how the gates are squashed. Only "official-v1" needs it: "tanh" as its trainer does, "identity" as its
            released inference script does. Its oldest files, with one gate per layer, are always read as "identity".
        name: of the adapter on this model.

    Returns:
        The handle, as from `zinit.attach`.

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe, of another kind, or does not fit the model.
        ConfigError: if a setting is impossible or the name is taken.
        BackboneError: if no backbone knows the model.

    Example:
        >>> handle = zinit.import_adapter(model, "llama_adapter_len10_layer30_release.pth")  # doctest: +SKIP
    """
    chosen: Format = FORMATS.get(format)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"length (prompts per layer) must be a whole number of at least 1; got {length!r}.")
    if gate not in ("tanh", "identity"):
        raise ConfigError(f"gate must be 'tanh' or 'identity'; got {gate!r}.")
    return _attach(model, *chosen.read(Path(path), model, length=length, gate=gate), name=name)


def export_adapter(handle: Handle, path: str | Path, *, format: str, **options: Any) -> None:
    """Writes an adapter in another implementation's format; see `zinit.Handle.export`.

    Args:
        handle: the adapter.
        path: the file ("official-v1") or folder ("peft").
        format: whose format.
        options: the format's own. "official-v1" takes ``reader="training"`` (the default) or ``"inference"``: the
            project's trainer squashes the stored gates, its released inference script does not.

    Raises:
        CheckpointError: if the format cannot express the adapter; the message says why.
        ConfigError: if there is no such format or option.
    """
    chosen: Format = FORMATS.get(format)
    if chosen.write is None:
        writes = ", ".join(name for name in FORMATS if FORMATS.get(name).write)
        raise CheckpointError(f"zinit reads {format!r} but does not write it. Formats it writes: {writes}.")
    known = list(inspect.signature(chosen.write).parameters)[2:]
    for option in options.keys() - known:
        raise ConfigError(f"the format {format!r} has no option {option!r}.{did_you_mean(option, known)}")
    try:
        chosen.write(handle, Path(path), **options)
    except OSError as error:
        raise CheckpointError(f"the adapter cannot be written to {path}: {error}.") from error


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
        options: see `export_adapter`.

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
        from zinit.adapter_file import AdapterFile

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
            handle = _attach(model, file.config, file.tensors, name=name, backbone=file.backbone)
        if target_format == OWN:
            handle.save(destination)
        else:
            export_adapter(handle, destination, format=target_format, **options)
    return handle


@contextmanager
def _unused_name(model: nn.Module) -> Iterator[str]:
    """A name for an adapter that is on the model only while inside; afterwards the model is as before."""
    before = _active(model)
    name = "converted"
    while name in _handles(model):
        name += "_"
    try:
        yield name
    finally:
        if name in _handles(model):
            _handles(model)[name].detach()
            if before is not None:
                before.activate()


def _attach(
    model: nn.Module, config: PrefixConfig, tensors: dict[str, Tensor], *, name: str, backbone: str | None = None
) -> Handle:
    from zinit.attach import attach

    # Beside each host's weights; where those have no storage (a model made of its config alone) on the CPU.
    device = "cpu" if next(model.parameters()).is_meta else None
    before = _active(model)
    handle = attach(model, config, name=name, backbone=backbone, device=device)
    try:
        handle.load_state_dict(tensors)
    except BaseException:
        handle.detach()
        if before is not None:
            before.activate()
        raise
    return handle


def _handles(model: nn.Module) -> dict[str, Handle]:
    from zinit.attach import ATTRIBUTE

    attachment = getattr(getattr(model, "_orig_mod", model), ATTRIBUTE, None)
    return attachment.handles if attachment else {}


def _active(model: nn.Module) -> Handle | None:
    return next((handle for handle in _handles(model).values() if handle.active), None)


def _causal_lm(source: str, *, weights: bool) -> nn.Module:
    """A language model, with its weights or as a shape without storage."""
    import torch

    from zinit.hosts import load_causal_lm, load_on_meta

    return load_causal_lm(source, dtype=torch.float32, tokenizer=False)[0] if weights else load_on_meta(source)
