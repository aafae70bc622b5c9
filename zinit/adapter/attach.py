"""Attaches an adapter to a model in place: a fresh one, or a saved one; for any backbone."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.adapter.build import build_modules, install, slot_key
from zinit.adapter.encoding import Encoder, load_feature_encoder, same_encoder
from zinit.adapter.file import AdapterFile
from zinit.adapter.handle import Handle
from zinit.adapter.recompute import watch
from zinit.adapter.sources import with_encoder
from zinit.adapter.state import ATTRIBUTE, AdapterState, state_of
from zinit.backbones import BACKBONES, find_backbone
from zinit.backbones.base import PrefixSlot
from zinit.compat import uncompiled
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.registry import did_you_mean


def attach(
    model: nn.Module,
    config: PrefixConfig | AdapterConfig | None = None,
    *,
    name: str = "default",
    backbone: str | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
    encoder: str | Path | Encoder | nn.Module | None = None,
) -> Handle:
    """Adds a prefix to the topmost layers of a model, in place, and freezes everything else.

    The model keeps its class, its API and its parameters' names. A second adapter may be attached under another name;
    the newest is the active one. If anything is wrong nothing has been changed.

    Args:
        model: any model that a registered backbone knows.
        config: K, L and ablations, or an adapter of several parts; default: 10 prompts in every layer.
        name: of this adapter on this model.
        backbone: a registered backbone's name; default: the one that knows the model.
        device: where the prefixes live; default: beside each host's weights.
        seed: for the random start of the prompts; default: torch's global generator.
        encoder: what makes features of images for the adapter's context source: a folder, name or Hub id, a model of
            transformers or timm, or an `Encoder`. It stays frozen and outside of the model.

    Returns:
        The handle: parameters, gates, save, switch, detach.

    Raises:
        BackboneError: if no backbone knows the model, or it has fewer layers than asked for.
        ConfigError: if an adapter of that name is attached already, or the name cannot be used.

    Examples:
        >>> import zinit, transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64))
        >>> handle = zinit.attach(model, zinit.PrefixConfig(length=5, layers=3))
        >>> handle.num_trainable  # 3 layers x (5 prompts x 32 + 4 gates)
        492
    """
    model = uncompiled(model)  # a compiled model: its graph is remade at the next call
    given = config or PrefixConfig()
    tower = None if encoder is None else load_feature_encoder(encoder, beside=model)
    if tower is not None:
        given = with_encoder(AdapterConfig.of(given), tower)
    whole = AdapterConfig.of(given)
    _check_names(model, name, whole)
    state = state_of(model) or _new_state(model, backbone)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    modules = build_modules(whole, model, list(state.sites.values()), device=device, generator=generator)
    install(state, name, modules)
    if state_of(model) is None:
        _take_over(state)
    handle = Handle(state, name, given, modules, encoder=tower)
    state.handles[name] = handle
    handle.activate()
    return handle


def _check_names(model: nn.Module, name: str, config: AdapterConfig) -> None:
    keys = [slot_key(name, part) for part in config.parts]
    if "__" in name or not all(map(PrefixSlot.can_hold, keys)):
        raise ConfigError(
            f"an adapter's name must be an identifier such as 'default' or 'chat_v2' that is no attribute of a torch "
            f"module and has no double underscore; got {name!r}."
        )
    state = state_of(model)
    if state is None:
        return
    if name in state.handles:
        raise ConfigError(
            f"this {type(model).__name__} has an adapter named {name!r} already. Detach it first, or pass another name."
        )
    state.check_no_route(f"attaching {name!r}")


def _new_state(model: nn.Module, backbone: str | None) -> AdapterState:
    """What is known of a model that has no adapter yet."""
    if any(isinstance(module, PrefixSlot) for module in model.modules()):
        raise ConfigError(
            f"this {type(model).__name__} shares layers with a model that has an adapter already. "
            f"Attach to that model under another name, or detach there first."
        )
    chosen = BACKBONES.get(backbone) if backbone else find_backbone(model)
    return AdapterState(
        model,
        chosen,
        {site.name: site for site in chosen.sites(model)},
        watch,
        trained_before={name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad},
    )


def _take_over(state: AdapterState) -> None:
    """Freezes the host and makes its ``generate`` compute prefix keys and values once."""
    _say_what_peft_loses(state)
    for parameter in state.trained_before.values():
        parameter.requires_grad_(False)
    model = state.model
    setattr(model, ATTRIBUTE, state)
    if callable(getattr(type(model), "generate", None)) and "generate" not in vars(model):
        # An attribute of this one model, so that pipelines and users who call model.generate get it too.
        vars(model)["generate"] = types.MethodType(_generate_with_cached_kv(type(model)), model)
        state.wraps_generate = True


def _say_what_peft_loses(state: AdapterState) -> None:
    """PEFT's own weights are frozen with the rest of the host: nobody who made them expects that in silence."""
    of_peft = [part for part in state.model.modules() if type(part).__module__.startswith("peft.")]
    own = {id(parameter) for part in of_peft for parameter in part.parameters()}
    frozen = [parameter for parameter in state.trained_before.values() if id(parameter) in own]
    if frozen:
        warnings.warn(
            f"{sum(parameter.numel() for parameter in frozen):,} weights of a PEFT adapter were trained and are frozen "
            f"from now on: the new adapter trains alone. To train both, call requires_grad_(True) on them again.",
            stacklevel=4,
        )


def load(
    model: nn.Module,
    source: str | Path,
    *,
    name: str = "default",
    check_weights: bool = True,
    revision: str | None = None,
    encoder: str | Path | Encoder | nn.Module | None = None,
) -> Handle:
    """Attaches a saved adapter.

    Args:
        model: the model it was made for.
        source: a folder that `Handle.save` wrote, or a Hub id.
        name: of the adapter on this model.
        check_weights: compare a sample of the model's weights with the ones the adapter was trained on. Turn it off
            for a base that was tuned a little since.
        revision: of the Hub repository.
        encoder: the one that the adapter was trained with, if that lies elsewhere now. By default it is loaded from
            where it was when an image is first given.

    Raises:
        CheckpointError: if the adapter is missing or damaged, or was made for another model: the message names the
            field that differs. The model is unchanged then.
    """
    file = AdapterFile.read(source, revision=revision)
    model = uncompiled(model)
    file.check_model(model, weights=check_weights)
    tower = None if encoder is None else same_encoder(encoder, file.encoder or {}, beside=model)
    handle = attach(model, file.config, name=name, backbone=file.backbone, seed=0)
    handle.load_state_dict(file.tensors)
    handle.encoder, handle.encoder_identity = tower, file.encoder
    return handle


def get_handle(model: nn.Module, name: str = "default") -> Handle:
    """The handle of an adapter that is attached already.

    Raises:
        ConfigError: if there is none of that name.
    """
    state = state_of(model)
    handles = state.handles if state else {}
    if name not in handles:
        hint = did_you_mean(name, handles) if handles else " Known: none. Make one with zinit.attach or zinit.load."
        raise ConfigError(f"this {type(model).__name__} has no adapter named {name!r}.{hint}")
    return handles[name]


def _generate_with_cached_kv(model_class: Any) -> Callable[..., Any]:
    """``generate`` of an adapted model: prefix keys and values are computed once, not per token."""

    @functools.wraps(model_class.generate)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        state: AdapterState = getattr(model, ATTRIBUTE)
        state.scope()  # warns where another thread has one and this thread has none
        with state.cached_kv():
            return model_class.generate(model, *args, **kwargs)

    return generate
