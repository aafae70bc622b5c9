"""The models that a task owns beside the one that is adapted: declared, loaded and frozen in one way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from zinit.errors import BackboneError, ConfigError, LoadingError, ZinitError
from zinit.models.loading import Loading
from zinit.models.room import check_vocabulary
from zinit.registry import import_object


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that a task needs beside the adapted one, such as an encoder of images.

    Args:
        source: folder or Hub id.
        loader: address of a function that is called as `zinit.models.loading.load_causal_lm` is, ``(source,
            **Loading)``, and returns the model and what prepares its inputs, such as ``"zinit.models.timm:load_timm"``.
        revision: on the Hub.
    """

    source: str
    loader: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and what prepares its inputs: a tokenizer, an image processor, the statistics of pixels."""

    model: nn.Module
    processor: Any


def call_loader(load: Callable[..., Any], source: str | Path, owner: str, **loading: Any) -> tuple[nn.Module, Any]:
    """A model and its processor from a loader, which need not know every setting of `Loading`.

    Args:
        load: takes at least a ``dtype`` and a ``revision``; one that reads weights straight to a ``device``, or
            quantises them (``quantize``), takes these too.
        source: folder or Hub id.
        owner: what the loader belongs to, for messages.
        loading: see `zinit.models.loading.Loading`.

    Raises:
        LoadingError: if there is no such model, or its tokenizer has tokens that its embedding has no row for.
        ConfigError: if the model is to be quantised and the loader does not know how.
    """
    parameters = inspect.signature(load).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        if loading.get("quantize") is not None and "quantize" not in parameters:
            name = getattr(load, "__name__", "loader")
            raise ConfigError(f"{owner} cannot quantise its model: its {name} takes no 'quantize'. Leave it out.")
        loading = {name: value for name, value in loading.items() if name in parameters}
    try:
        model, processor = load(source, **loading)
        check_vocabulary(model, processor, source)
    except BackboneError as error:
        raise LoadingError(str(error)) from error
    return model, processor


def load_model(name: str, spec: ModelSpec, **loading: Unpack[Loading]) -> LoadedModel:
    """One further model of a task, frozen and in evaluation mode.

    Args:
        name: what the task calls it, for messages.
        spec: what to load.
        loading: dtype, device and quantisation, the same as the adapted model's; the revision is the spec's.

    Raises:
        ZinitError: the loader's own, with the model's name in front.
    """
    owner = f"the task's model {name!r}"
    try:
        load = import_object(spec.loader)
        model, processor = call_loader(load, spec.source, owner, **{**loading, "revision": spec.revision})
    except ZinitError as error:
        raise type(error)(str(error) if owner in str(error) else f"{owner}: {error}") from error
    return LoadedModel(model=model.requires_grad_(False).eval(), processor=processor)


def load_models(specs: Mapping[str, ModelSpec], **loading: Unpack[Loading]) -> dict[str, LoadedModel]:
    """All further models that a task declares, by name; see `load_model`."""
    return {name: load_model(name, spec, **loading) for name, spec in specs.items()}
