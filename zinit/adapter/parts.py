"""What stands at an attention module where several prefixes are on: their additions sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zinit.adapter.scopes import prompts_of
from zinit.backbones.base import ActivePrefix, AttentionSite
from zinit.config import PrefixConfig
from zinit.prefix import Context, ProjectKV, ZeroGatedPrefix


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an adapter.

    Attributes:
        name: in the adapter's ``parts``.
        config: K, layers, gate and prompts.
        takes_context: whether a context of the adapter goes to it.
        prefixes: {site: its prefix there}, lowest layer first.
    """

    name: str
    config: PrefixConfig
    takes_context: bool
    prefixes: dict[str, ZeroGatedPrefix] = field(default_factory=dict)


class PrefixWithContext:
    """One prefix, and the context that goes to it in this call.

    Args:
        prefix: whose addition it makes.
        site: where it is.
        context: if there is one.
        adapter: whose it is, where modules that prompts pass are tuned.
    """

    def __init__(
        self,
        prefix: ZeroGatedPrefix,
        site: AttentionSite,
        context: Tensor | Context | None = None,
        adapter: str | None = None,
    ) -> None:
        self.prefix, self.site, self.config = prefix, site, prefix.config
        self.context, self.adapter = context, adapter

    def keys_values(self, project: ProjectKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `ZeroGatedPrefix.keys_values`."""
        if self.adapter is None:
            return self.prefix.keys_values(project, dtype, self.context)
        with prompts_of(self.adapter):
            return self.prefix.keys_values(project, dtype, self.context)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `ZeroGatedPrefix.forward`."""
        self.check_rows(query.shape[0])
        return self.prefix(query, key, value, scale)

    def toward(self, query: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        """See `ZeroGatedPrefix.toward`."""
        return self.prefix.toward(query, own, shared)

    def check_rows(self, batch: int) -> None:
        """See `AttentionSite.check_rows`."""
        if self.context is not None:
            tokens = self.context.tokens if isinstance(self.context, Context) else self.context
            self.site.check_rows("a context for", tokens.shape[0], batch)


class SumOfPrefixes:
    """Several prefixes, each with a softmax of its own: o_h + the sum of their additions.

    Args:
        members: at least two.
    """

    def __init__(self, members: Sequence[ActivePrefix]) -> None:
        self.members, self.config = members, members[0].config

    def keys_values(self, project: ProjectKV, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """A tuple of keys and one of values: lengths differ."""
        pairs = [member.keys_values(project, dtype) for member in self.members]
        return tuple(key for key, _ in pairs), tuple(value for _, value in pairs)

    def __call__(self, query: Tensor, key: tuple[Any, ...], value: tuple[Any, ...], scale: float) -> Tensor:
        """(B, H, T, D), in the order of the members."""
        total: Tensor | None = None
        for member, own_key, own_value in zip(self.members, key, value, strict=True):
            addition = member(query, own_key, own_value, scale)
            total = addition if total is None else total + addition
        assert total is not None
        return total


def together(members: Sequence[ActivePrefix]) -> ActivePrefix | None:
    """One stand-in for all of them; None for none."""
    if len(members) > 1:
        return SumOfPrefixes(members)
    return members[0] if members else None
