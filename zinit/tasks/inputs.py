"""What a task is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from zinit.models.several import LoadedModel

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle


@dataclass(frozen=True, kw_only=True)
class DataInputs:
    """Which data a task reads, beside its settings.

    Args:
        data: source of the examples; None is the embedded demo's.
        seed: of everything random in the task: its head, its splits.
        train: False leaves the training examples unread, for an evaluation on ``held_out_data``.
        labels: class names of a finished run, in the order of the head's outputs; None takes the data's.
    """

    data: str | None = None
    seed: int = 0
    train: bool = True
    labels: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class TaskInputs(DataInputs):
    """What a task is made of, beside its settings; see `DataInputs` for the rest.

    Args:
        model: the adapted model.
        processor: what `Task.load_model` returned with it: a tokenizer, statistics of pixels.
        handle: the adapter on the model; None for methods that have none.
        examples: what `Task.read_data` returned; None reads them now.
        models: the further models that the task declared (`Task.further_models`), by name, frozen.
    """

    model: nn.Module
    processor: Any = None
    handle: Handle | None = None
    examples: Any = None
    models: Mapping[str, LoadedModel] = field(default_factory=dict)
