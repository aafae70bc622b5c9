"""Attach a prefix to a model in place, and take it off again; for any backbone."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit.adapter.formats import FORMATS
from zinit.adapter.routing import routed
from zinit.adapter.select import select_sites
from zinit.adapter.state import ATTRIBUTE, Attachment
from zinit.backbones import BACKBONES, find_backbone
from zinit.backbones.base import AttentionSite, PrefixSlot
from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.prefix import ZeroGatedPrefix
from zinit.registry import did_you_mean

if TYPE_CHECKING:
    from zinit.adapter.file import AdapterFile


def attach(
    model: nn.Module,
    config: PrefixConfig | None = None,
    *,
    name: str = "default",
    backbone: str | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> Handle:
    """Adds a prefix to the topmost layers of a model, in place, and freezes everything else.

    The model keeps its class, its API and its parameters' names. A second adapter may be attached under another name;
    the newest is the active one. If anything is wrong nothing has been changed.

    Args:
        model: any model that a registered backbone knows.
        config: K, L and ablations; default: 10 prompts in every layer.
        name: of this adapter on this model.
        backbone: a registered backbone's name; default: the one that knows the model.
        device: where the prefixes live; default: beside each host's weights.
        seed: for the random start of the prompts; default: torch's global generator.

    Returns:
        The handle: parameters, gates, save, switch, detach.

    Raises:
        BackboneError: if no backbone knows the model, or it has fewer layers than asked for.
        ConfigError: if an adapter of that name is attached already, or the name cannot be used.

    Example:
        >>> import zinit, transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=64))
        >>> handle = zinit.attach(model, zinit.PrefixConfig(length=5, layers=3))
        >>> handle.num_trainable  # 3 layers x (5 prompts x 32 + 4 gates)
        492
    """
    config = config or PrefixConfig()
    model = getattr(model, "_orig_mod", model)  # a compiled model: its graph is remade at the next call
    attachment: Attachment | None = getattr(model, ATTRIBUTE, None)
    if not PrefixSlot.can_hold(name):
        raise ConfigError(
            f"an adapter's name must be an identifier such as 'default' or 'chat_v2' that is no attribute of a torch "
            f"module; got {name!r}."
        )
    if attachment is not None and name in attachment.handles:
        raise ConfigError(
            f"this {type(model).__name__} has an adapter named {name!r} already. Detach it first, or pass another name."
        )
    if attachment is not None:
        attachment.check_no_route(f"attaching {name!r}")
    else:
        if any(isinstance(module, PrefixSlot) for module in model.modules()):
            raise ConfigError(
                f"this {type(model).__name__} shares layers with a model that has an adapter already. "
                f"Attach to that model under another name, or detach there first."
            )
        chosen = BACKBONES.get(backbone) if backbone else find_backbone(model)
        attachment = Attachment(
            chosen,
            {site.name: site for site in chosen.sites(model)},
            trained_before=[parameter for parameter in model.parameters() if parameter.requires_grad],
        )
    sites = select_sites(model, list(attachment.sites.values()), config)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    prefixes = {
        site.name: ZeroGatedPrefix(
            config, **site.shape(), device=_device_of(site.module) if device is None else device, generator=generator
        )
        for site in sites
    }
    with ExitStack() as undo:  # an installation that fails takes the earlier ones back
        for site in sites:
            if site.name not in attachment.slots:
                slot = PrefixSlot(site.project_kv)
                attachment.backbone.install(model, site, slot)
                undo.callback(attachment.uninstall, model, site)
                attachment.slots[site.name] = slot
        undo.pop_all()
    # From here on nothing fails.
    for site in sites:
        attachment.slots[site.name][name] = prefixes[site.name]
    if getattr(model, ATTRIBUTE, None) is None:
        for parameter in attachment.trained_before:
            parameter.requires_grad_(False)
        setattr(model, ATTRIBUTE, attachment)
        if callable(getattr(type(model), "generate", None)) and "generate" not in vars(model):
            # An attribute of this one model, so that pipelines and users who call model.generate get it too.
            vars(model)["generate"] = types.MethodType(_frozen_generate(type(model)), model)
            attachment.wraps_generate = True
    handle = Handle(model, name, config, prefixes)
    attachment.handles[name] = handle
    handle.activate()
    return handle


class Handle:
    """One adapter on one model. Made by `attach` and `load`.

    Attributes:
        model: the adapted model.
        name: the adapter's name on it.
        config: as attached.
        prefixes: {site name: prefix}.
    """

    def __init__(self, model: nn.Module, name: str, config: PrefixConfig, prefixes: dict[str, ZeroGatedPrefix]) -> None:
        self.model, self.name, self.config, self.prefixes = model, name, config, prefixes

    def __repr__(self) -> str:
        attached = self.name in getattr(getattr(self.model, ATTRIBUTE, None), "handles", {})
        state = ("active" if self.active else "inactive") if attached else "detached"
        return f"<zinit adapter {self.name!r}: {len(self.prefixes)} layers, {self.num_trainable:,} parameters, {state}>"

    @property
    def attachment(self) -> Attachment:
        """What zinit did to the model.

        Raises:
            ConfigError: after `detach`.
        """
        attachment = getattr(self.model, ATTRIBUTE, None)
        if attachment is None or self.name not in attachment.handles:
            raise ConfigError(f"the adapter {self.name!r} is no longer attached. Attach or load it again.")
        return attachment

    @property
    def backbone(self) -> str:
        """The backbone's registered name."""
        return self.attachment.backbone.name

    @property
    def sites(self) -> list[AttentionSite]:
        """The adapted attention modules, lowest layer first."""
        return [self.attachment.sites[name] for name in self.prefixes]

    @property
    def active(self) -> bool:
        """Whether this is the adapter that the model uses now."""
        return all(self.attachment.slots[site].active == self.name for site in self.prefixes)

    @property
    def num_trainable(self) -> int:
        """How many numbers this adapter learns."""
        return sum(parameter.numel() for parameter in self.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("model.layers.7.self_attn.gate", parameter) and so on, in the order of the layers."""
        for site, prefix in self.prefixes.items():
            for name, parameter in prefix.named_parameters():
                yield f"{site}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """This adapter's parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """This adapter's parameters by role, in the order of `parameters`: "gates", "prompts" (keys and values too).

        Each role may have a rate and a decay of its own in training.
        """
        gates = [prefix.gate for prefix in self.prefixes.values() if prefix.config.gating]
        known = {id(gate) for gate in gates}
        return {"gates": gates, "prompts": [p for p in self.parameters() if id(p) not in known]}

    def gates(self) -> dict[str, Tensor]:
        """{site name: (H,) gates after squashing}, detached."""
        return {site: prefix.gates().detach() for site, prefix in self.prefixes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: detached tensor}: exactly what is saved."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies values in.

        Raises:
            CheckpointError: if names or shapes differ in any way; nothing is changed then.
        """
        from zinit.files import check_tensors

        own = dict(self.named_parameters())
        check_tensors(tensors, {name: tuple(parameter.shape) for name, parameter in own.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        for site in self.prefixes:
            self.attachment.slots[site].frozen = None

    def activate(self) -> None:
        """Makes this the model's adapter. Others stay attached, frozen and unused. A route comes before it."""
        for site, slot in self.attachment.slots.items():
            slot.active = self.name if site in self.prefixes else None
            slot.frozen = None
        for handle in self.attachment.handles.values():
            for parameter in handle.parameters():
                parameter.requires_grad_(handle is self)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The frozen model, bit for bit, while inside. An adapter that is activated inside stays on."""
        slots = self.attachment.slots
        before = {name: slot.active for name, slot in slots.items()}
        routes = {name: slot.route for name, slot in slots.items() if slot.route is not None}
        for slot in slots.values():
            slot.active = slot.route = None
        try:
            yield
        finally:
            if all(slot.active is None for slot in slots.values()):
                for name, slot in slots.items():
                    slot.active = before.get(name)
            for name, route in routes.items():
                slots[name].route, slots[name].frozen = route, None

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Gives each sample of a batch its own adapter while inside, `generate` included; for inference.

        Every adapter's keys and values are computed once, here. A batch may be a multiple of the route's length, as in
        beam search: the beams of one sample lie side by side. Which adapter is active plays no part.

        Args:
            names: for each sample the name of an adapter on this model, or None for the frozen model. K, layers, gates
                and parametrizations may differ.

        Raises:
            ConfigError: if a name is unknown, an adapter shares the words' softmax or has a context. And at the model's
                call, if the batch does not fit, or gradients are enabled.

        Example:
            >>> with handle.route(["anna", "bert", None]):  # doctest: +SKIP
            ...     model.generate(**three_texts)
        """
        with routed(self.attachment, names), self.attachment.frozen_prefix():
            yield

    @contextmanager
    def context(self, context: Tensor) -> Iterator[None]:
        """Adds a per-sample context to this adapter's prompts while inside, `generate` included (paper, Eq. 10).

        For training under gradient checkpointing pass ``zinit_context=context`` to the model instead: layers that are
        recomputed after the scope has closed must see it too.

        Args:
            context: (B, 1 or K, C).

        Raises:
            ConfigError: if the shape does not fit, or the adapter learns keys and values (which take no context).
        """
        slots = [self.attachment.slots[name] for name in self.prefixes]
        for prefix in self.prefixes.values():
            prefix.check_context(context)
        before = slots[0].contexts.get(self.name)

        def put(context: Tensor | None) -> None:
            for slot in slots:
                slot.frozen = None  # what a surrounding `frozen_prefix` computed is of another context
                slot.contexts.pop(self.name, None)
                if context is not None:
                    slot.contexts[self.name] = context

        put(context)
        try:
            yield
        finally:
            put(before)

    @contextmanager
    def frozen_prefix(self) -> Iterator[None]:
        """Computes every prompt's keys and values once for all forward passes inside that want no gradient.

        `model.generate` does this by itself. Weights changed inside are not noticed; outside nothing is kept.
        """
        with self.attachment.frozen_prefix():
            yield

    def detach(self) -> None:
        """Takes this adapter off; with the last one the model is again what it was before `attach`.

        Raises:
            ConfigError: inside a route.
        """
        attachment = self.attachment
        attachment.check_no_route(f"detaching {self.name!r}")
        for site in self.prefixes:
            slot = attachment.slots[site]
            del slot[self.name]
            slot.contexts.pop(self.name, None)
            if slot.active == self.name:
                slot.active = None
            if not len(slot):
                attachment.uninstall(self.model, attachment.sites[site])
        del attachment.handles[self.name]
        if not attachment.handles:
            for parameter in attachment.trained_before:
                parameter.requires_grad_(True)
            if attachment.wraps_generate:
                del vars(self.model)["generate"]
            delattr(self.model, ATTRIBUTE)

    def save(self, directory: str | Path) -> None:
        """Writes ``adapter.safetensors`` and ``adapter.json``; each appears whole or not at all.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        from zinit.adapter.file import AdapterFile

        AdapterFile.of(self).write(directory)

    def export(self, path: str | Path, *, format: str, **options: Any) -> None:
        """Writes the adapter in another implementation's format ("official-v1", "peft").

        Raises:
            CheckpointError: if that format cannot express this adapter; the message says why.
        """
        FORMATS.get(format).export(self, path, format=format, **options)


def load(
    model: nn.Module,
    source: str | Path,
    *,
    name: str = "default",
    check_weights: bool = True,
    revision: str | None = None,
) -> Handle:
    """Attaches a saved adapter.

    Args:
        model: the model it was made for.
        source: a folder that `Handle.save` wrote, or a Hub id.
        name: of the adapter on this model.
        check_weights: compare a sample of the model's weights with the ones the adapter was trained on. Turn it off
            for a base that was tuned a little since.
        revision: of the Hub repository.

    Raises:
        CheckpointError: if the adapter is missing or damaged, or was made for another model: the message names the
            field that differs. The model is unchanged then.
    """
    from zinit.adapter.file import AdapterFile

    file: AdapterFile = AdapterFile.read(source, revision=revision)
    model = getattr(model, "_orig_mod", model)
    file.check_model(model, weights=check_weights)
    handle = attach(model, file.config, name=name, backbone=file.backbone, seed=0)
    handle.load_state_dict(file.tensors)
    return handle


def get_handle(model: nn.Module, name: str = "default") -> Handle:
    """The handle of an adapter that is attached already.

    Raises:
        ConfigError: if there is none of that name.
    """
    attachment: Attachment | None = getattr(getattr(model, "_orig_mod", model), ATTRIBUTE, None)
    handles = attachment.handles if attachment else {}
    if name not in handles:
        hint = did_you_mean(name, handles) if handles else " Known: none. Make one with zinit.attach or zinit.load."
        raise ConfigError(f"this {type(model).__name__} has no adapter named {name!r}.{hint}")
    return handles[name]


def _frozen_generate(model_class: Any) -> Callable[..., Any]:
    """``generate`` of an adapted model: prefix keys and values are computed once, not per token."""

    @functools.wraps(model_class.generate)
    def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(model, ATTRIBUTE).frozen_prefix():
            return model_class.generate(model, *args, **kwargs)

    return generate


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
