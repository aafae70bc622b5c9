"""The settings of the task conversation; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from zinit.errors import ConfigError
from zinit.registry import did_you_mean
from zinit.tasks.conversation.registry import AUTO, TEMPLATES
from zinit.tasks.settings import AskingConfig
from zinit.validation import Folder, Name, PositiveFloat, PositiveInt, Words, shown

Weights = Annotated[tuple[PositiveFloat, ...], MinLen(1), Words("a list of numbers above 0, one for each --data")]


@dataclass(frozen=True, kw_only=True)
class ConversationConfig(AskingConfig):
    """What the task does with its data. Conversations longer than ``max_length`` lose rounds from the front.

    Args:
        template: how a conversation is written: a name that ``zinit ls templates`` lists; "auto" is the tokenizer's own
            chat template where it has one, and "vicuna" where not.
        system: what the assistant is told in conversations that do not say it; None is the template's own.
        weights: passes over each source in an epoch, one number for each ``--data``; None is one pass over all.
        held_out: conversations kept from training for evaluation, at most a tenth of the data.
        held_out_data: a source of its own for the held-out conversations instead.
        demo: which embedded data where no ``--data`` is given: "instructions" about the invented world, "flags" of its
            towns with questions about them, or "flag-names", of which only the towns' names are trained.
        validation: hold a tenth of the embedded demo's training part out, in the place of its held-out part: to choose
            settings by.
        images: whether the conversations' images are used; without them the texts are trained on alone;
            experts see them all the same.
        image_folder: what the paths of images are relative to; None is the folder of the records' file.
    """

    template: Name = AUTO
    system: str | None = None
    weights: Weights | None = None
    held_out: PositiveInt = 200
    held_out_data: str | None = None
    demo: Literal["instructions", "flags", "flag-names"] = "instructions"
    validation: bool = False
    images: bool = True
    image_folder: Folder | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template != AUTO and self.template not in TEMPLATES:
            raise ConfigError(f"no template named {shown(self.template)}.{did_you_mean(self.template, TEMPLATES)}")
