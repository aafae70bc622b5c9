"""What a method must answer. The engine trains whatever a method leaves trainable, and the task's head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zinit.config import JsonConfig, PrefixConfig

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle
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
class NoSettings(JsonConfig):
    """For methods that have none."""


class Method(ABC):
    """A way to adapt a pretrained model.

    Args:
        config: its settings, of the class's ``Config``.

    Attributes:
        name: registered name.
        trains_host: whether weights of the model itself are trained, which then are float32 unless said otherwise.
    """

    name: str
    Config: type[JsonConfig] = NoSettings
    trains_host = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def apply(
        self, model: nn.Module, *, prefix: PrefixConfig, backbone: str, seed: int, saved: Path | None = None
    ) -> Adapted:
        """Freezes the model and adds what is to be trained, in place where that is possible.

        Args:
            model: as loaded.
            prefix: the run's prefix settings; methods without a prefix look at ``towers`` at most.
            backbone: registered name.
            seed: of everything random.
            saved: a finished run's folder, to load the prefix from. Other weights are loaded by the run.

        Raises:
            ConfigError: if the method cannot be used on this model; it says why.
        """

    def solve(self, task: Task) -> bool:
        """Trains without the engine where the method has a closed procedure of its own.

        Returns:
            Whether it did; False sends the task to the engine.
        """
        return False
