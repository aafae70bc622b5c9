"""One batch, many adapters: each sample's own prefix in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zinit.adapter.parts import together
from zinit.adapter.scopes import Change, Kept, Route, Scope, prompts_of, scope_of
from zinit.adapter.state import AdapterState
from zinit.adapter.tuning import by_sample
from zinit.backbones.base import ActivePrefix, AttentionSite, PrefixSlot
from zinit.errors import ConfigError
from zinit.prefix import (
    ProjectKV,
    ZeroGatedPrefix,
    attend_prompts,
    for_each_sample,
    gates_by_query,
    multiply_by_matrix,
)
from zinit.registry import did_you_mean

Names = Sequence[str | None]


class RoutedPrefix:
    """Stands in for one attention module's prefix during a route: the same two calls, a prefix of its own per sample.

    Shapes as in `zinit.prefix`, and R samples in the route. Shorter prefixes are padded to the longest and the padding
    masked; a sample without a prefix here has values of zero, so that its addition is exactly zero.

    Args:
        route: an adapter's name or None for each sample.
        prefixes: {adapter: its prefix here}; some may have none.
        site: where it is.
        tuned: adapters that tune the host: their prompts pass their own tuning, and nobody else's.
        kept: says what other routes have computed already, see `zinit.adapter.state.AdapterState.kept`.

    Attributes:
        prefixes: those that the route uses.
        config: of one of them; all have a softmax of their own, or all a matrix.
        mask: (R, 1, 1, K), 0 or -inf; None if nothing is padded.
        by_query: (R, 1, 1, 1), whose gates depend on the query; None if nobody's do.
    """

    def __init__(
        self,
        route: Names,
        prefixes: Mapping[str, ZeroGatedPrefix],
        site: AttentionSite,
        tuned: Collection[str] = (),
        kept: Callable[[], Kept | None] = lambda: None,
    ) -> None:
        self.site, self.tuned, self.kept = site, tuned, kept
        self.prefixes = {name: prefixes[name] for name in dict.fromkeys(route) if name is not None and name in prefixes}
        self.samples, self.mask, self.by_query = len(route), None, None
        if not self.prefixes:
            return
        first = next(iter(self.prefixes.values()))
        self.config = first.config
        device = next(first.parameters()).device
        number = {name: 1 + index for index, name in enumerate(self.prefixes)}  # 0 is the frozen model
        self.rows = torch.tensor([0 if name is None else number.get(name, 0) for name in route], device=device)
        lengths = torch.tensor([prefix.config.length for prefix in self.prefixes.values()], device=device)
        self.length = int(lengths.max())
        if int(lengths.min()) < self.length:
            lengths = F.pad(lengths, (1, 0), value=self.length)[self.rows]
            padding = torch.arange(self.length, device=device) >= lengths[:, None]
            self.mask = torch.zeros(padding.shape, device=device).masked_fill(padding, -math.inf)[:, None, None]
        if any(prefix.by_query for prefix in self.prefixes.values()):
            by_query = [False, *(prefix.by_query for prefix in self.prefixes.values())]
            self.by_query = torch.tensor(by_query, device=device)[self.rows, None, None, None]

    def keys_values(self, project: ProjectKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each sample's keys and gated values, (R, H, K, D)."""
        kept = self.kept()
        pairs = {} if kept is None else kept.pairs
        device = self.rows.device.type
        how = dtype, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        missing = {name: prefix for name, prefix in self.prefixes.items() if (prefix, *how) not in pairs}
        if missing:
            own = self._of_each(missing, project, dtype)
            pairs |= {(missing[name], *how): pair for name, pair in own.items()}
        found = [pairs[prefix, *how] for prefix in self.prefixes.values()]
        key, value = (self._for_each_row([pair[index] for pair in found]) for index in (0, 1))
        return key, value

    def _of_each(
        self, prefixes: Mapping[str, ZeroGatedPrefix], project: ProjectKV, dtype: torch.dtype
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each adapter's keys and gated values; what passes the same projections passes them together."""
        prompts = {name: prefix.prompt() for name, prefix in prefixes.items() if hasattr(prefix, "prompt")}
        projected: dict[str, tuple[Tensor, Tensor]] = {}
        through: dict[str, list[str]] = {}
        for name in prompts:
            through.setdefault(name if name in self.tuned else "", []).append(name)
        for tuning, names in through.items():
            with prompts_of(tuning):
                key, value = project(torch.cat([prompts[name].to(dtype) for name in names]))
            lengths = [len(prompts[name]) for name in names]
            pieces = zip(key.split(lengths, 2), value.split(lengths, 2), strict=True)
            projected |= dict(zip(names, pieces, strict=True))
        return {
            name: prefix.keys_values(lambda _, name=name: projected[name], dtype) for name, prefix in prefixes.items()
        }

    def _for_each_row(self, tensors: list[Tensor]) -> Tensor:
        longest = max(x.shape[2] for x in tensors)
        padded = [x if x.shape[2] == longest else F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in tensors]
        return torch.cat([torch.zeros_like(padded[0]), *padded]).index_select(0, self.rows)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The addition to the host's attention output; see `ZeroGatedPrefix.forward`.

        Raises:
            ConfigError: if it is not known which row of the batch is of which sample.
        """
        self.check_rows(query.shape[0])
        if is_matrix(self):
            addition = multiply_by_matrix(query, value)
        else:
            addition = attend_prompts(query, key, value, scale, self.mask)
        if self.by_query is None:
            return addition
        # Only here do gates by query come in: those of all others are in the values.
        gates = gates_by_query(query, for_each_sample(self._weights(), query)[..., 0])
        return torch.where(for_each_sample(self.by_query.float(), query) > 0, gates * addition, addition)

    def _weights(self) -> Tensor:
        """(R, H, D, 1), what queries are multiplied by for their gates; zeros where a sample's are not by query."""
        shape = self.site.num_heads, self.site.head_dim
        own = [prefix.gate.expand(shape) if prefix.by_query else None for prefix in self.prefixes.values()]
        zeros = torch.zeros(shape, device=self.rows.device)
        return torch.stack([zeros, *(zeros if one is None else one for one in own)])[self.rows][..., None]

    def check_rows(self, batch: int) -> None:
        """See `AttentionSite.check_rows`."""
        self.site.check_rows("a route of", self.samples, batch)


@contextmanager
def routed(state: AdapterState, names: Names) -> Iterator[None]:
    """Gives every slot a `RoutedPrefix` for this thread while inside.

    Raises:
        ConfigError: if the names are no list of attached adapters with a softmax of their own, or None.
    """
    route = [names] if isinstance(names, str) else list(names)
    if isinstance(names, str) or not route:
        raise ConfigError(f"a route is a list with an adapter's name or None for each sample; got {names!r}.")
    for name in dict.fromkeys(route):
        if name is not None:
            _check_routable(state, name)
    tuned = {name for tunings in state.tuned.values() for name in tunings}
    found: dict[Any, Tensor] = {}
    with torch.no_grad():
        here = Route(
            tuple(route),
            {site: _at_slot(state, route, slot, tuned) for site, slot in state.slots.items()},
            {module: by_sample(state, route, module, found) for module in state.tuned},
            state.version,
        )
    state.routes += 1
    try:
        with state.opened(Change(state.key, lambda scope: Scope(scope.on, here, scope.contexts, kept=scope.kept))):
            yield
    finally:
        state.routes -= 1


def _check_routable(state: AdapterState, name: str) -> None:
    if name not in state.handles:
        raise ConfigError(f"no adapter named {name!r} is attached.{did_you_mean(str(name), state.handles)}")
    handle = state.handles[name]
    if not all(part.config.separate_softmax for part in handle.parts.values()):
        raise ConfigError(
            f"the adapter {name!r} shares the words' softmax (separate_softmax=False) and cannot be part of a route. "
            f"Activate it and call the model with its samples alone."
        )
    if name in (scope_of(state.key) or Scope()).contexts:
        raise ConfigError(
            f"a route takes no context, and {name!r} has one: leave handle.context(...), or call the adapters one by "
            f"one."
        )


def _at_slot(state: AdapterState, route: Names, slot: PrefixSlot, tuned: Collection[str]) -> ActivePrefix | None:
    """The sum over the adapters' first prefixes here, their second ones, and so on; contexts are absent in a route.

    Those with a matrix in the place of prompts are computed apart.
    """
    routed: list[RoutedPrefix] = []
    for matrix in (False, True):
        own: dict[str, list[ZeroGatedPrefix]] = {}
        for name in dict.fromkeys(name for name in route if name is not None):
            here: list[Any] = [slot[key] for key in slot.members.get(name, ())]
            own[name] = [prefix for prefix in here if prefix.config.prompt != "context" and is_matrix(prefix) == matrix]
        for rank in range(max(map(len, own.values()), default=0)):
            at_rank = {name: parts[rank] for name, parts in own.items() if rank < len(parts)}
            routed.append(RoutedPrefix(route, at_rank, state.sites[slot.site], tuned, state.kept))
    return together([prefix for prefix in routed if prefix.prefixes])


def is_matrix(prefix: ActivePrefix) -> bool:
    """Whether it has matrices in the place of prompts."""
    return prefix.config.parametrization == "matrix"
