"""The repeated blocks of a model, found by structure instead of by name."""

from __future__ import annotations

from torch import nn


def kinds_of_blocks(module: nn.Module) -> set[str]:
    """Class names of a model's blocks: the members of its outermost lists of several modules of one class."""
    members = list(module.children())
    several = isinstance(module, nn.ModuleList | nn.Sequential) and len(members) > 1
    if several and len({type(member) for member in members}) == 1 and any(members[0].children()):
        return {type(members[0]).__name__}
    return set().union(*map(kinds_of_blocks, members))
