"""One adapter on one model: its parameters, what is on, saving it, taking it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.build import AdapterModules, slot_key, uninstall
from zinit.adapter.encoding import Encoder, Features, encode, same_encoder
from zinit.adapter.file import AdapterFile
from zinit.adapter.fingerprint import fingerprint
from zinit.adapter.hub import card_of, upload
from zinit.adapter.parts import Part
from zinit.adapter.registries import FORMATS
from zinit.adapter.routing import routed
from zinit.adapter.scopes import Change, SwitchOn
from zinit.adapter.sources import as_tables
from zinit.adapter.state import ATTRIBUTE, AdapterState
from zinit.adapter.tuning import Tuning
from zinit.backbones.base import AttentionSite
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.files import check_tensors
from zinit.prefix import Context, ZeroGatedPrefix
from zinit.registry import did_you_mean


class Handle:
    """One adapter on one model. Made by `attach` and `load`.

    Attributes:
        name: the adapter's name on the model.
        config: as attached.
        encoder: makes features of images, see `given`; None until it is needed, or where the adapter has none.
        encoder_identity: of the encoder that the adapter is trained with; None where there is none.
        takes_context: keys in the slots of the prefixes that a context goes to; asked at every call of a layer.
    """

    def __init__(
        self,
        state: AdapterState,
        name: str,
        config: PrefixConfig | AdapterConfig,
        modules: AdapterModules,
        *,
        encoder: Encoder | None = None,
    ) -> None:
        self._state, self.name, self.config, self._modules = state, name, config, modules
        self.encoder = encoder
        self.encoder_identity = None if encoder is None else encoder.identity
        self.takes_context = tuple(slot_key(name, part.name) for part in modules.parts.values() if part.takes_context)

    def __repr__(self) -> str:
        attached = self._state.handles.get(self.name) is self
        on = ("active" if self.active else "inactive") if attached else "detached"
        return f"<zinit adapter {self.name!r}: {len(self.prefixes)} layers, {self.num_trainable:,} parameters, {on}>"

    # --- what it is ---

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self._state.model

    @property
    def state(self) -> AdapterState:
        """What zinit did to the model.

        Raises:
            ConfigError: after `detach`.
        """
        if self._state.handles.get(self.name) is not self:
            raise ConfigError(f"the adapter {self.name!r} is no longer attached. Attach or load it again.")
        return self._state

    @property
    def backbone(self) -> str:
        """The backbone's registered name."""
        return self.state.backbone.name

    @property
    def parts(self) -> dict[str, Part]:
        """The adapter's parts by name; "prefix" is the only one of an adapter made of a `PrefixConfig`."""
        return self._modules.parts

    @property
    def prefixes(self) -> dict[str, ZeroGatedPrefix]:
        """{site: prefix}, lowest layer first; {"part.site": prefix} where there are several parts."""
        return self._modules.prefixes()

    @property
    def shared(self) -> dict[str, nn.Module]:
        """What several layers use: "hyper" and "deepshare" make prompts, "context" makes each sample's context."""
        return self._modules.shared

    @property
    def tuning(self) -> Tuning | None:
        """What the adapter changes in the host's own modules."""
        return self._modules.tuning

    @property
    def sites(self) -> list[AttentionSite]:
        """The adapted attention modules, lowest layer first."""
        adapted = {site for part in self.parts.values() for site in part.prefixes}
        return [site for name, site in self.state.sites.items() if name in adapted]

    @property
    def num_trainable(self) -> int:
        """How many numbers this adapter learns."""
        return sum(parameter.numel() for parameter in self.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("model.layers.7.self_attn.gate", parameter) and so on, in the order of the layers."""
        return self._modules.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """This adapter's parameters."""
        for _, parameter in self.named_parameters():
            yield parameter

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """This adapter's parameters by role, each in the order of `parameters`; roles without any are left out.

        "gates"; "prompts", learned keys, values, matrices and a network of prompts too; "source", the module that makes
        a context; "tuning". Each may have a rate and a decay of its own in training.
        """
        role = {id(prefix.gate): "gates" for prefix in self.prefixes.values() if prefix.config.gating}
        for name, module in (("source", self.shared.get("context")), ("tuning", self.tuning)):
            role |= {} if module is None else {id(parameter): name for parameter in module.parameters()}
        found: dict[str, list[nn.Parameter]] = {}
        for parameter in self.parameters():
            found.setdefault(role.get(id(parameter), "prompts"), []).append(parameter)
        return {name: found[name] for name in ("gates", "prompts", "source", "tuning") if name in found}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """This adapter's parameters by what they serve: what makes and gates a context, "visual", and the rest.

        Raises:
            ConfigError: if no part of it takes nothing but a context.
        """
        visual = [part for part in self.parts.values() if part.config.prompt == "context"]
        if not visual:
            raise ConfigError(
                f"the adapter {self.name!r} has one group of parameters: no part of it has prompt='context'."
            )
        own = {id(p) for part in visual for prefix in part.prefixes.values() for p in prefix.parameters()}
        if (source := self.shared.get("context")) is not None:
            own |= {id(parameter) for parameter in source.parameters()}
        found: dict[str, list[nn.Parameter]] = {"visual": [], "language": []}
        for parameter in self.parameters():
            found["visual" if id(parameter) in own else "language"].append(parameter)
        return found

    def gates(self) -> dict[str, Tensor]:
        """{site: (H,) gates after squashing}, detached; named as `prefixes`."""
        return {name: prefix.gates().detach() for name, prefix in self.prefixes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: detached tensor}: exactly what is saved."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies values in.

        Raises:
            CheckpointError: if names or shapes differ in any way; nothing is changed then.
        """
        own = dict(self.named_parameters())
        check_tensors(tensors, {name: tuple(parameter.shape) for name, parameter in own.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self._state.version += 1

    # --- what is on ---

    @property
    def active(self) -> bool:
        """Whether the model uses this adapter now, for this thread."""
        return self.name in self.state.names_on()

    def activate(self, *names: str) -> None:
        """Makes this the model's only adapter, or exactly the named ones, this among them: their additions sum.

        Others stay attached, frozen and unused. Only this adapter's parameters want gradients. A route comes before it.

        Args:
            names: adapters that are on together; none is this one alone.

        Raises:
            ConfigError: if one is not attached, or shares the words' softmax, which stands alone.
        """
        state = self.state
        for name in names:
            if name not in state.handles:
                raise ConfigError(f"no adapter named {name!r} is attached.{did_you_mean(name, state.handles)}")
        if names and self.name not in names:
            raise ConfigError(f"activate names the adapters that are on, {self.name!r} among them; got {list(names)}.")
        state.switch_on(tuple(dict.fromkeys(names)) or (self.name,))
        for handle in state.handles.values():
            for parameter in handle.parameters():
                parameter.requires_grad_(handle is self)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit, while inside. An adapter that is activated inside stays on."""
        with self.state.opened(SwitchOn(self.state.key, ())):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """This adapter and no other while inside, for this thread; which one is active plays no part."""
        with self.state.opened(SwitchOn(self.state.key, (self.name,))):
            yield

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Gives each sample of a batch its own adapter while inside, `generate` included.

        Under ``torch.no_grad()`` (``generate`` is) every adapter's keys and values are computed once, here; with
        gradients, at each call, and each adapter that wants gradients gets its own rows'. Where text is generated a
        batch may be a multiple of the route's length, as in beam search: beams of a sample lie side by side. Which
        adapter is active plays no part.

        Args:
            names: for each sample the name of an adapter on this model, or None for the base model. K, layers, gates,
                parts, parametrizations and tunings may differ.

        Raises:
            ConfigError: if a name is unknown, an adapter shares the words' softmax, has a context, or a tuning that
                cannot tell samples apart. And at the model's call, if the batch does not fit, or a module that is tuned
                takes words without their samples.

        Examples:
            >>> with torch.no_grad(), handle.route(["anna", "bert", None]):  # doctest: +SKIP
            ...     model.generate(**three_texts)
        """
        with routed(self.state, names), self.state.cached_kv():
            yield

    @contextmanager
    def context(self, context: Tensor | Context) -> Iterator[None]:
        """Gives this adapter a context while inside, `generate` included (paper, Eq. 10).

        ``model(..., zinit_context=context)`` does it for one call.

        Args:
            context: (B, 1 or K, C) added to its prompts, or (B, K, C) where a part has nothing else; a `Context` says
                besides which samples have one.

        Raises:
            ConfigError: if the shape does not fit, or no part takes a context (learned keys and values do not).
        """
        taking = [part for part in self.parts.values() if part.takes_context] or list(self.parts.values())
        checked = next(prefix.check_context(context) for part in taking for prefix in part.prefixes.values())

        def apply(scope: Any) -> Any:
            return replace(scope, contexts={**scope.contexts, self.name: checked}, cached=None)

        with self.state.opened(Change(self.state.key, apply)):
            yield

    @contextmanager
    def given(
        self,
        *,
        image: Sequence[Any] | Tensor | None = None,
        audio: Sequence[Any] | Tensor | None = None,
        video: Sequence[Any] | Tensor | None = None,
        vector: Sequence[Any] | Tensor | None = None,
        features: Any = None,
    ) -> Iterator[None]:
        """Makes each sample's context of its images, once, and gives it while inside, `generate` included.

        Args:
            image: for each sample an image or its path, a list of several, or None; or pixels (B, 3, H, W). The
                adapter's encoder runs once.
            audio: sound files instead, for an encoder of sound.
            video: videos instead, for an encoder of video.
            vector: files of ready features instead, for the encoder ``vectors:WIDTH``.
            features: instead, what an encoder made, as the adapter's source takes it; vectors (B, F) and mixtures of
                several senses for "bind" (`zinit.adapter.bind.Senses`).

        Raises:
            ConfigError: if the adapter has no source, or no encoder.

        Examples:
            >>> with handle.given(image=["cat.jpg", None]):  # doctest: +SKIP
            ...     model.generate(**two_texts)
        """
        source = self.shared.get("context")
        if source is None:
            raise ConfigError(
                f"the adapter {self.name!r} takes no images: it has no context source. Attach one with "
                f"zinit.AdapterConfig(..., context='visual-tokens')."
            )
        senses = {"image": image, "audio": audio, "video": video, "vector": vector}
        shown = [(sense, items) for sense, items in senses.items() if items is not None]
        if len(shown) + (features is not None) != 1:
            raise ConfigError("give either image=... (or audio=..., video=..., vector=...) or features=....")
        for sense, items in shown:
            encoder = self.get_encoder()
            if encoder.modality != sense:
                raise ConfigError(f"the adapter's encoder takes {encoder.modality}; got {sense}=.... Use its own name.")
            features = encode(encoder, items, layers=getattr(source, "layers", 0))
        parameter = next(source.parameters(), None)
        if isinstance(features, Features) and parameter is not None:
            features = features.to(parameter.device)
        with self.context(source(features)):
            yield

    def get_encoder(self) -> Encoder:
        """What makes features of images for this adapter; it is loaded when it is first asked for.

        Raises:
            ConfigError: if there is none.
            CheckpointError: if what lies there now is another one.
        """
        if self.encoder is None:
            identity = self.encoder_identity or {}
            if not identity.get("source"):
                raise ConfigError(
                    f"the adapter {self.name!r} has no encoder for images: pass encoder=... to zinit.attach or "
                    f"zinit.load, or give features=...."
                )
            self.encoder = same_encoder(identity["source"], identity, beside=self.model)
        return self.encoder

    @contextmanager
    def cached_kv(self) -> Iterator[None]:
        """Computes every prompt's keys and values once for all forward passes inside that want no gradient.

        Routes inside, with whichever adapters, compute those of each adapter once.
        `model.generate` does this by itself. Weights changed inside are not noticed; outside nothing is kept.
        """
        with self.state.cached_kv(keep=True):
            yield

    frozen_prefix = cached_kv  # its name before version 0.2

    # --- taking it off, writing it ---

    def detach(self) -> None:
        """Takes this adapter off; with the last one the model is again what it was before `attach`.

        Raises:
            ConfigError: inside a route.
        """
        state = self.state
        state.check_no_route(f"detaching {self.name!r}")
        uninstall(state, self.name)
        del state.handles[self.name]
        state.on = tuple(name for name in state.on if name != self.name)
        state.version += 1
        if not state.handles:
            state.thaw()
            if state.wraps_generate:
                del vars(state.model)["generate"]
            delattr(state.model, ATTRIBUTE)

    def to_file(self, *, tables: bool = False) -> AdapterFile:
        """The adapter as it is now, with what identifies its model.

        Args:
            tables: in the place of networks of prompts (``prompts="hyper"``), the plain tables that they make.
        """
        config, tensors = self.config, self.state_dict()
        if tables:
            config, tensors = as_tables(config, self.prefixes, tensors)
        return AdapterFile(
            config=config,
            backbone=self.backbone,
            fingerprint=fingerprint(self.model, list(self.state.sites.values())),
            tensors={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            encoder=self.encoder_identity,
        )

    def save(self, directory: str | Path, *, tables: bool = False) -> None:
        """Writes ``adapter.safetensors`` and ``adapter.json``; each appears whole or not at all.

        Args:
            directory: the folder.
            tables: see `to_file`.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        self.to_file(tables=tables).write(directory)

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Saves the adapter in a repository of the Hub, which is made if need be; `zinit.from_pretrained` loads it.

        Args:
            repository: "user/name".
            private: whether a new repository is; None is the account's own setting.
            token: of the Hub; default: the one that was logged in with.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: if the Hub refuses.
        """
        file = self.to_file()
        body = f"An adapter of {self.num_trainable:,} numbers in {len(self.prefixes)} places."
        card = card_of(file.fingerprint.get("name_or_path"), repository.rpartition("/")[2], body)
        return upload(file, repository, card=card, private=private, token=token)

    def export(self, path: str | Path, *, format: str, **options: Any) -> None:
        """Writes the adapter in another implementation's format; ``zinit ls formats`` says which are written.

        Raises:
            CheckpointError: if that format cannot express this adapter; the message says why.
        """
        FORMATS.get(format).export(self, path, format=format, **options)
