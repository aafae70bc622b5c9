"""What is kept from training where the data do not say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from zinit.errors import DataError

Item = TypeVar("Item")


def hold_out(items: Sequence[Item], most: int, seed: int, name: str, what: str) -> tuple[list[Item], list[Item]]:
    """Sets at most a tenth apart, chosen by the seed.

    Args:
        items: records, images, conversations.
        most: of them to set apart; at least one is.
        seed: of the choice.
        name: of the data, for messages.
        what: one of the items is called.

    Returns:
        The rest, in order, and those set apart, in the order of the draw.

    Raises:
        DataError: if there are fewer than two.
    """
    if len(items) < 2:
        raise DataError(f"{name} holds {len(items)} {what}; at least 2 are needed, one of them held out.")
    count = min(most, max(1, len(items) // 10))
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    return [item for place, item in enumerate(items) if place not in chosen], [items[i] for i in order[:count]]
