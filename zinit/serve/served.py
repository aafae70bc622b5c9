"""The models that a server has: one base in memory, and adapters on it that come and go."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zinit.adapter.attach import load
from zinit.adapter.encoding import Encoder, encode
from zinit.adapter.file import AdapterFile, fetch
from zinit.adapter.handle import Handle
from zinit.errors import CheckpointError, ConfigError
from zinit.models.decoding import Chooser, check_batches
from zinit.models.generation import conversational, describe_own, unusable
from zinit.models.loading import load_causal_lm
from zinit.models.offload import move
from zinit.models.room import positions
from zinit.prefix import Context
from zinit.registry import did_you_mean
from zinit.runs.build import load_base
from zinit.runs.images import load_encoder
from zinit.serve.apart import apart
from zinit.serve.requests import BASE, ModelInfo, Refused
from zinit.serve.source import Source
from zinit.tasks import TASKS
from zinit.tasks.base import Task
from zinit.tasks.chat import ChatFormat
from zinit.tasks.conversation.config import ConversationConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(eq=False, kw_only=True)
class Served:
    """A model that can be asked: the base, or an adapter on it.

    Attributes:
        name: in requests.
        handle: the adapter; None is the base.
        task: whose raw prompts it takes.
        format: makes prompts of conversations.
        routable: whether it may share a batch with others.
        blind: why it takes no images; empty if it does.
        note: whose weights they are, where they are not those of a run's end.
        created: when it was loaded.
    """

    name: str
    handle: Handle | None
    task: type[Task]
    format: ChatFormat
    routable: bool = True
    blind: str = ""
    note: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def info(self) -> ModelInfo:
        """What others are told."""
        return ModelInfo(id=self.name, sees=not self.blind, created=self.created)

    def gates(self) -> list[dict[str, Any]]:
        """For each site of the adapter "name" and "values", one for each head; NaN where there is none yet."""
        found = {} if self.handle is None else self.handle.gates()
        return [{"name": name, "values": gate.flatten().tolist()} for name, gate in found.items()]

    @torch.no_grad()
    def see(self, images: Sequence[Any]) -> Context:
        """The context that a request's images make, for one sample.

        Args:
            images: at least one, in RGB.
        """
        assert self.handle is not None
        source: Any = self.handle.shared["context"]
        features = encode(self.handle.get_encoder(), [list(images)], layers=getattr(source, "layers", 0))
        return source(features.to(next(source.parameters()).device))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An adapter that is not on the base yet.

    Attributes:
        name: in requests.
        source: a folder of this machine.
        encoder: of its run, loaded.
    """

    name: str
    source: Source
    encoder: Encoder | None


class Models:
    """One base and the adapters on it.

    Args:
        source: a run, checkpoint or adapter that says which base.
        model: where the base lies, instead of what ``source`` says.
        template: how conversations are written for adapters that come without a run; see ``zinit ls templates``.
        device: that it runs on; default: an accelerator if there is one.

    Attributes:
        base: the model, of transformers.
        tokenizer: of it.
        by_name: what can be asked; "base" is the model without an adapter.
        uses: which of the base's own generation settings shape answers, in words; nothing if it has none.

    Raises:
        ZinitError: if the base cannot be loaded, or cannot be served in batches.
    """

    @apart
    def __init__(
        self, source: str, *, model: str | None = None, template: str = "auto", device: torch.device | None = None
    ) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = device or accelerator or torch.device("cpu")
        first = Source.read(source)
        self.base, self.tokenizer = self._load_base(first, model)
        self.base.eval().requires_grad_(False)
        check_batches(self.base)
        self.room = positions(self.base)
        self.uses = self._check_generation()
        self.template = ConversationConfig(template=template)
        self._encoders: dict[Any, Encoder | None] = {}
        self._loading = threading.Lock()  # of encoders
        self._numbers = itertools.count()
        task, form = self._format(first)
        self.by_name = {BASE: Served(name=BASE, handle=None, task=task, format=form, blind="it is the base")}

    @classmethod
    def of(cls, sources: Mapping[str, str], *, model: str | None = None, template: str = "auto") -> Models:
        """The base of the first source, with all of them on it.

        Args:
            sources: {name in requests: run, checkpoint or adapter}.
            model: see the class.
            template: see the class.

        Raises:
            ZinitError: if one cannot be served; what its folder shows is said before the base is loaded.
        """
        for where in sources.values():
            Source.read(where)
        models = cls(next(iter(sources.values())), model=model, template=template)
        for name, where in sources.items():
            models.add(name, where)
        return models

    def _check_generation(self) -> str:
        """See ``uses``. Settings that cannot be used are refused here, and not at every request."""
        eos = self.tokenizer.eos_token_id
        config, used, ignored = conversational(self.base, eos_token_id=eos, do_sample=True, max_new_tokens=1)
        scores = torch.zeros(self.base.get_input_embeddings().weight.shape[0], device=self.base.device)
        try:
            Chooser(self.base, config, [eos], seed=0)(scores, [])
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise unusable(error) from error
        return describe_own(used, ignored)

    def _load_base(self, first: Source, model: str | None) -> tuple[Any, Any]:
        if first.run is not None:
            config = first.run if model is None else replace(first.run, model=model)
            loaded, tokenizer = load_base(config, self.device, load_to="cpu" if config.offload else None)
            move(loaded, self.device, offload=config.offload)
            return loaded, tokenizer
        where = model or AdapterFile.read(first.where).fingerprint.get("name_or_path")
        if not where:
            raise CheckpointError(f"{first.where} does not say which model it was made for: --model FOLDER_OR_HUB_ID.")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load_causal_lm(where, dtype=dtype, device=self.device)

    def _format(self, source: Source) -> tuple[type[Task], ChatFormat]:
        task: type[Task] = TASKS.get("conversation" if source.run is None else source.run.task)
        options = self.template if source.run is None else source.run.options
        return task, task.chat_format(self.tokenizer, options)

    def add(self, name: str, where: str) -> None:
        """Loads an adapter under a name.

        Raises:
            ConfigError: if the name is taken or cannot be used.
            CheckpointError: if it is of another base.
        """
        self.attach(self.prepare(name, where))

    @apart
    def prepare(self, name: str, where: str) -> Prepared:
        """What takes long of `add`, and leaves the base alone: answers may be generated meanwhile.

        Raises:
            ConfigError: if the name is taken or cannot be used.
            CheckpointError: if there is no such adapter.
        """
        self._check_name(name)
        source = Source.read(where)
        if source.saved is None:
            source = replace(source, where=str(fetch(source.where)))
        with self._loading:
            return Prepared(name=name, source=source, encoder=self._encoder(source))

    @apart
    def attach(self, prepared: Prepared) -> None:
        """The rest of `add`, while no scope of an adapter is open.

        Raises:
            ConfigError: if the name was taken since.
            CheckpointError: if the adapter is of another base.
        """
        name, source, encoder = prepared.name, prepared.source, prepared.encoder
        self._check_name(name)
        with source.adapter(self.base, encoder) as folder:
            handle = load(self.base, folder, name=f"served{next(self._numbers)}", encoder=encoder)
        try:
            task, form = self._format(source)
            self.by_name[name] = Served(
                name=name,
                handle=handle,
                task=task,
                format=form,
                routable=is_routable(handle),
                blind=_blind(source, handle),
                note=source.note,
            )
        except Exception:
            handle.detach()
            raise

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"a model's name is letters, digits, '.', '_' and '-', at most 100; got {name[:100]!r}. Name it: "
                f"NAME=FOLDER."
            )
        if name in self.by_name:
            raise ConfigError(f"there is a model named {name!r} already. Give another name: NAME=FOLDER.")

    def remove(self, name: str) -> None:
        """Takes an adapter off.

        Raises:
            Refused: if there is none.
        """
        handle = self.removable(name).handle
        assert handle is not None
        del self.by_name[name]
        handle.detach()

    def removable(self, name: str) -> Served:
        """What `remove` would take off.

        Raises:
            Refused: if there is none.
        """
        if name == BASE:
            raise Refused("the base cannot be taken away.")
        return self.get(name)

    def get(self, name: str) -> Served:
        """What goes by a name in requests.

        Raises:
            Refused: if nothing does.
        """
        if name not in self.by_name:
            hint = did_you_mean(name[:100], self.by_name)
            raise Refused(
                f"there is no model {name[:100]!r}.{hint}", status=404, code="model_not_found", parameter="model"
            )
        return self.by_name[name]

    def _encoder(self, source: Source) -> Encoder | None:
        """That of a run; runs with the same one share it."""
        if source.run is None or source.run.context is None:
            return None
        own = source.run.encoder
        key = (own.source, own.revision, own.bgr, source.run.model is None)
        if key not in self._encoders:
            self._encoders[key] = load_encoder(source.run, beside=self.base)
        return self._encoders[key]


def is_routable(handle: Handle) -> bool:
    """Whether an adapter may share a batch with others; the route knows."""
    try:
        with handle.route([handle.name]):
            return True
    except ConfigError:
        return False


def _blind(source: Source, handle: Handle) -> str:
    """Why an adapter takes no images; empty if it does."""
    if getattr(getattr(source.run, "options", None), "experts", ()):
        return "it was trained with what experts say about images, which a server does not ask"
    if "context" not in handle.shared:
        return "it was trained on texts alone"
    sense = (handle.encoder_identity or {}).get("modality", "image")
    return "" if sense == "image" else f"its encoder takes {sense}, which requests do not carry"
