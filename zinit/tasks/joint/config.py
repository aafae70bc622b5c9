"""The settings of the task joint; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.tasks import TASKS
from zinit.validation import Name, NonNegativeFloat, Words, in_section

Ratios = Annotated[
    tuple[NonNegativeFloat, NonNegativeFloat], Words("two numbers from 0 on, for the stream of images and of language")
]
PARTS = ("visual", "language")


@dataclass(frozen=True, kw_only=True)
class JointConfig(JsonConfig):
    """Which tasks are joined. ``--data`` is given twice: first that of the images, then that of the language.

    Args:
        visual: the task of the stream with images.
        language: the task of the stream of texts; it counts the epochs.
        ratios: examples of each per step, as multiples of ``train.batch_size``: images, language. 0 leaves one out.
        disjoint: each stream trains its own parameters, where the adapter tells them apart (V2, section 3.3); false
            lets both train all.
        visual_options: settings of the task with images.
        language_options: settings of the task of texts.
    """

    visual: Name = "caption"
    language: Name = "alpaca"
    ratios: Ratios = (1.0, 1.0)
    disjoint: bool = True
    visual_options: dict[str, Any] = field(default_factory=dict)
    language_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.ratios):
            raise ConfigError("ratios leave nothing to train on: one of them must be above 0.")
        for part in PARTS:
            self.of(part)

    def of(self, part: str) -> Any:
        """The settings of one of the tasks, "visual" or "language".

        Raises:
            ConfigError: naming the setting that is wrong.
        """
        settings: type[JsonConfig] = TASKS.fact(getattr(self, part), "Config")
        try:
            return settings.from_dict(getattr(self, f"{part}_options"))
        except ConfigError as error:
            raise in_section(f"task.{part}_options", error) from error
