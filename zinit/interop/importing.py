"""Attaches an adapter that another implementation trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zinit.adapter.attach import attach
from zinit.adapter.encoding import Encoder, load_feature_encoder
from zinit.adapter.handle import Handle
from zinit.adapter.registries import FORMATS
from zinit.adapter.state import state_of
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import CheckpointError, ConfigError
from zinit.files import parsing
from zinit.interop.base import Format, Gate


def import_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "official-v1",
    length: int = 10,
    gate: Gate = "tanh",
    name: str = "default",
    encoder: str | Path | Encoder | nn.Module | None = None,
    **options: Any,
) -> Handle:
    """Attaches an adapter that another implementation trained. If anything is wrong the model is unchanged.

    Args:
        model: the model it was made for.
        path: the file, or folder ("peft").
        format: the implementation, see ``zinit ls formats``. LitGPT's files are "litgpt" and "litgpt-v2" from its
            version 0.5.5 on, "litgpt-legacy" and "litgpt-v2-legacy" before; the file does not say which.
        length: K. Only the official formats need it: their files hold one table of K x L prompts and neither factor.
        gate: how the gates are squashed. Only "official-v1" needs it: "tanh" as its trainer does, "identity" as its
            released inference script does. Its oldest files, with one gate per layer, are always read as "identity".
        name: of the adapter on this model.
        encoder: of images, for formats that take them; see `zinit.attach`. Without one, `Handle.given` takes features.
        options: the format's own. "official-v2" takes ``heads=16``, of its visual blocks, which the file does not say;
            "official-v1" that too, for a file that takes images, and ``branch="text"`` for the other adapter in it.

    Returns:
        The handle, as from `zinit.attach`.

    Raises:
        CheckpointError: if the file is missing, damaged, unsafe, of another kind, or does not fit the model.
        ConfigError: if a setting is impossible or the name is taken.
        BackboneError: if no backbone knows the model.

    Examples:
        >>> handle = zinit.import_adapter(model, "llama_adapter_len10_layer30_release.pth")  # doctest: +SKIP
    """
    chosen: Format = FORMATS.get(format)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigError(f"length (prompts per layer) must be a whole number of at least 1; got {length!r}.")
    if gate not in ("tanh", "identity"):
        raise ConfigError(f"gate must be 'tanh' or 'identity'; got {gate!r}.")
    chosen.check_reading(options, format=format)
    what = f"{path} does not hold what a file of {format!r} does"
    with parsing(what, CheckpointError, "Is the format the right one?"):
        config, tensors = chosen.read(Path(path), model, length=length, gate=gate, **options)
    tower = None if encoder is None else load_feature_encoder(encoder, beside=model, bgr=chosen.bgr)
    return attach_tensors(model, config, tensors, name=name, encoder=tower)


def attach_tensors(
    model: nn.Module,
    config: PrefixConfig | AdapterConfig,
    tensors: dict[str, Tensor],
    *,
    name: str,
    backbone: str | None = None,
    encoder: Encoder | None = None,
) -> Handle:
    """Attaches an adapter of known tensors; on any error the model is as before."""
    # On the devices of the host's weights; on the CPU if they have no storage (a model built from its config alone).
    device = "cpu" if next(model.parameters()).is_meta else None
    before = active_handle(model)
    handle = attach(model, config, name=name, backbone=backbone, device=device, encoder=encoder)
    try:
        handle.load_state_dict(tensors)
    except BaseException:
        handle.detach()
        if before is not None:
            before.activate()
        raise
    return handle


def handles_on(model: nn.Module) -> dict[str, Handle]:
    """The adapters of a model, by name."""
    state = state_of(model)
    return state.handles if state else {}


def active_handle(model: nn.Module) -> Handle | None:
    """The adapter that is on."""
    return next((handle for handle in handles_on(model).values() if handle.active), None)
