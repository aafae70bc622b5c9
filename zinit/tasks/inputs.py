"""What a task is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from zinit.errors import ConfigError
from zinit.experts.base import Expert, make_expert
from zinit.models.several import LoadedModel

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle
    from zinit.encoders.cache import FeatureCache


@dataclass(frozen=True, kw_only=True)
class DataInputs:
    """Which data a task reads, beside its settings.

    Args:
        data: source of the examples, or several for tasks that read several; None is the embedded demo's.
        seed: of everything random in the task: its head, its splits.
        train: False leaves the training examples unread, for an evaluation on ``held_out_data``.
        labels: class names of a finished run, in the order of the head's outputs; None takes the data's.
        make_expert: what makes an expert of the words that name it; a run's also knows finished runs.
    """

    data: str | tuple[str, ...] | None = None
    seed: int = 0
    train: bool = True
    labels: list[str] | None = None
    make_expert: Callable[[str], Expert] = make_expert

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the examples, in order; none is the embedded demo's."""
        return () if self.data is None else (self.data,) if isinstance(self.data, str) else tuple(self.data)

    @property
    def source(self) -> str | None:
        """The one source of the examples, for tasks that read one.

        Raises:
            ConfigError: if there are several.
        """
        if len(self.sources) > 1:
            raise ConfigError(f"the task reads one source; got {len(self.sources)}: {', '.join(self.sources)}.")
        return self.sources[0] if self.sources else None


@dataclass(frozen=True, kw_only=True)
class TaskInputs(DataInputs):
    """What a task is made of, beside its settings; see `DataInputs` for the rest.

    Args:
        model: the adapted model.
        processor: what `Task.load_model` returned with it: a tokenizer, statistics of pixels.
        handle: the adapter on the model; None for methods that have none.
        examples: what `Task.read_data` returned; None reads them now.
        models: the further models that the task declared (`Task.further_models`), by name, frozen.
        features: of images, as the adapter's context source takes them; None where the adapter takes no images.
    """

    model: nn.Module
    processor: Any = None
    handle: Handle | None = None
    examples: Any = None
    models: Mapping[str, LoadedModel] = field(default_factory=dict)
    features: FeatureCache | None = None
