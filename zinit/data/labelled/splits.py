"""What is trained and what is evaluated on: the data's own parts, or a random part of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from zinit.data.labelled.parts import Labelled, Parts


def hold_out(
    examples: Sequence[Labelled], one_in: int, seed: int, *, classes: Sequence[str] | None = None, singles: bool = False
) -> tuple[list[Labelled], list[Labelled]]:
    """Sets one in ``one_in`` apart, class by class; at least one of every class that has two.

    Args:
        examples: to divide.
        one_in: 10 sets a tenth apart, rounded down.
        seed: of the choice.
        classes: the order in which chance goes through them; None is that of the alphabet.
        singles: whether the only image of a class is set apart too.

    Returns:
        What stays, and what was set apart, both in the order of ``examples``.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_class[example.label].append(index)
    generator = torch.Generator().manual_seed(seed)
    apart: set[int] = set()
    for label in sorted(by_class) if classes is None else classes:
        members = by_class[label]
        count = max(1, len(members) // one_in) if len(members) > 1 or singles else 0
        apart |= {members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()}
    stay = [example for index, example in enumerate(examples) if index not in apart]
    return stay, [examples[index] for index in sorted(apart)]


def tested(parts: Parts) -> list[Labelled]:
    """The test part, or else the validation part; all images where the source has neither."""
    return next(part for part in (parts.test, parts.val, parts.train) if part is not None)
