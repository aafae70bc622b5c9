"""What a method must answer. The engine trains whatever a method leaves trainable, and the task's head."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zinit.config import AdapterConfig, JsonConfig, PrefixConfig
from zinit.methods.defaults import NO_DEMOS, Tables
from zinit.methods.defaults import NONE as NO_DEFAULTS
from zinit.methods.rates import NONE, Rates
from zinit.methods.settings import NoSettings

if TYPE_CHECKING:
    from zinit.adapter.encoding import Encoder
    from zinit.adapter.handle import Handle
    from zinit.backbones.base import AttentionSite
    from zinit.tasks.base import Task


@dataclass(kw_only=True)
class Adapted:
    """A model that is ready to be trained.

    Attributes:
        model: what the task calls: the model itself, or a wrapper that is called like it.
        handle: the prefix, for methods that have one.
        disabled: makes a scope in which the model computes what it did before. Doing nothing is right for methods
            whose model is unchanged until it is trained.
    """

    model: nn.Module
    handle: Handle | None = None
    disabled: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class ApplyContext:
    """What a method may need to know of the run.

    Args:
        prefix: the run's prefix settings; methods without a prefix look at ``towers`` at most.
        adapter: the run's adapter, for methods that attach one; None is of that prefix alone.
        backbone: registered name.
        seed: of everything random.
        saved: a finished run's folder, to load the prefix from. Other weights are loaded by the run.
        models: the further models of the task, by name: frozen unless the method says otherwise.
        encoder: makes features of images for the adapter's context source; None where there is none.
    """

    prefix: PrefixConfig
    backbone: str
    seed: int
    saved: Path | None = None
    adapter: AdapterConfig | None = None
    models: Mapping[str, nn.Module] = field(default_factory=dict)
    encoder: Encoder | None = None

    @property
    def attached(self) -> AdapterConfig:
        """The adapter's settings."""
        return self.adapter or AdapterConfig.of(self.prefix)

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """Every attention module of the towers that the settings name, for methods that put something into each."""
        from zinit.adapter.select import select_sites
        from zinit.backbones import BACKBONES

        return select_sites(model, BACKBONES.get(self.backbone).sites(model), PrefixConfig(towers=self.prefix.towers))


class Method(ABC):
    """A way to adapt a pretrained model.

    Args:
        config: its settings, of the class's ``Config``.

    Attributes:
        name: registered name.
        takes_parts: whether it attaches an adapter, which may have several parts, a context source and a tuning.
        defaults: settings that it begins with, as tables of a config file.
        demos: {backbone: the preset of the method's own demo on it}.
        trains_host: whether weights of the model itself are trained, which are then float32 unless a dtype is set.
        default_rates: by the role of what trains, the rate that it trains at where nobody says another. Empty takes
            the preset's, or else the loop's own.
    """

    name: str
    Config: type[JsonConfig] = NoSettings
    takes_parts = False
    trains_host = False
    default_rates: Rates = NONE
    defaults: Tables = NO_DEFAULTS
    demos: Mapping[str, str] = NO_DEMOS

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        """Freezes the model and adds what is to be trained, in place where that is possible.

        Args:
            model: as loaded.
            context: the run's settings that a method may need.

        Raises:
            ConfigError: if the method cannot be used on this model; it says why.
        """

    def attached(self, adapter: AdapterConfig) -> AdapterConfig | None:
        """The adapter that `apply` attaches; None, as here, for methods without one.

        Args:
            adapter: the run's, see `ApplyContext`.
        """
        return None

    def untrained(self) -> tuple[str, ...]:
        """The roles in the adapter that it does not train, as another run has, from which it starts (``--from``)."""
        return ()

    def solve(self, task: Task) -> bool:
        """Trains without the engine where the method has a closed procedure of its own.

        Returns:
            Whether it did; False sends the task to the engine.
        """
        return False


def apply_method(method: Method, model: nn.Module, context: ApplyContext) -> Adapted:
    """Applies a method; also one whose ``apply`` takes the settings one by one, as zinit 0.1 passed them."""
    apply: Any = method.apply
    if "prefix" not in inspect.signature(apply).parameters:
        return apply(model, context)
    settings = {"prefix": context.prefix, "backbone": context.backbone, "seed": context.seed, "saved": context.saved}
    return apply(model, **settings)
