"""What zinit did to one model, and which of its prefixes are on."""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zinit import compat
from zinit.adapter.parts import Part, PrefixWithContext, together
from zinit.adapter.scopes import SCOPES, CachedKV, Change, Kept, Scope, SwitchOn, changes_of, opened, refresh, scope_of
from zinit.backbones.base import ActivePrefix, AtSlot, AttentionSite, Backbone, PrefixSlot
from zinit.distributed import is_shard
from zinit.errors import ConfigError
from zinit.prefix import Context

ATTRIBUTE = "_zinit"  # of the model, where its state is kept
STALE = -1  # a version that no adapters have: what was made ahead in a route is made anew
NO_CONTEXT_IN_ROUTE = "a route takes no context: leave it out, or call the adapters one by one."
_keys = itertools.count()


class Attached(Protocol):
    """What the state needs to know of an adapter (a `zinit.adapter.handle.Handle`).

    Attributes:
        parts: by name.
        takes_context: keys in the slots of the prefixes that a context goes to.
        tuning: what it changes in the host's own modules, if anything.
    """

    @property
    def parts(self) -> Mapping[str, Part]: ...
    @property
    def takes_context(self) -> tuple[str, ...]: ...
    @property
    def tuning(self) -> nn.Module | None: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def state_of(model: nn.Module) -> AdapterState | None:
    """What zinit did to a model; None if nothing. A compiled model is the one that was compiled."""
    return getattr(compat.uncompiled(model), ATTRIBUTE, None)


@dataclass(eq=False)
class AdapterState:
    """What zinit did to one model: enough to undo all of it. Lives on the model, shared by its adapters.

    Attributes:
        model: the host.
        backbone: that knows it.
        sites: all its attention modules that can take a prefix.
        handles: its adapters by name, each a handle (see `Attached`).
        slots: {site: slot}, where prefixes are.
        on: the adapters that are on, where no scope says otherwise.
        trained_before: the host's parameters that were trained before the first adapter froze them, by name.
        wraps_generate: whether the model's ``generate`` is ours.
        version: goes up whenever a prefix may give other keys and values than before.
        key: names this model among the scopes of a thread.
        open: the scopes that are open in any thread.
        tuned: {module: {adapter: its tuning}}; the hooks that serve them are ``hooks``.
        beside: {tuned module: the attention module whose batch is its too}.
        watch: puts the hooks of `zinit.adapter.recompute` there, when the first call may need them.
        watches_blocks: whether they all are there.
        block_hooks: {block: its hook of them}.
        entry_hooks: {module: the hook that `zinit.adapter.calls` has there}.
        no_scope: the scope of a thread that has none.
        outside: what such a thread sees, see `snapshot`.
        routes: that are open, in all threads.
        warned: whether a thread without a scope was told of one elsewhere.
        checked: whether it was looked for adapters that were frozen by others.
    """

    model: nn.Module
    backbone: Backbone
    sites: dict[str, AttentionSite]
    watch: Callable[[AdapterState], None]
    handles: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, PrefixSlot] = field(default_factory=dict)
    on: tuple[str, ...] = ()
    trained_before: dict[str, nn.Parameter] = field(default_factory=dict)
    wraps_generate: bool = False
    version: int = 0
    key: int = field(default_factory=lambda: next(_keys))
    open: set[Change] = field(default_factory=set)
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, AttentionSite] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    block_hooks: dict[str, RemovableHandle] = field(default_factory=dict)
    watches_blocks: bool = False
    entry_hooks: dict[str, RemovableHandle] = field(default_factory=dict)
    routes: int = 0
    warned: bool = False
    no_scope: Scope = field(default_factory=Scope)
    outside: Scope = field(default_factory=Scope)
    checked: bool = False

    def __getstate__(self) -> dict[str, Any]:
        shared = {"no_scope": Scope(), "outside": Scope()}  # what is known at a site is this model's
        return {**vars(self), **shared, "open": set(), "routes": 0, "warned": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, key=next(_keys))  # a copy has scopes of its own

    # --- scopes ---

    @contextmanager
    def opened(self, change: Change) -> Iterator[None]:
        """A scope of this thread, which other threads do not see."""
        self.open.add(change)
        try:
            with opened(change):
                yield
        finally:
            self.open.discard(change)

    def scope(self) -> Scope:
        """What this thread's scopes come to."""
        return SCOPES.get().get(self.key) or self._without_scope()

    def _without_scope(self) -> Scope:
        if self.open and not self.warned and not torch.compiler.is_compiling():
            self._warn()
        return self.no_scope

    def snapshot(self) -> Scope:
        """What this thread sees now, for a layer that is computed again later."""
        scope = self.scope()
        if scope is not self.no_scope:
            route = None if scope.route is None else replace(scope.route, version=STALE)
            return replace(scope, on=self.names_on(), route=route, cached=None, kept=None)
        if self.outside.on != self.on:
            self.outside = Scope(on=self.on)
        return self.outside

    def _warn(self) -> None:
        self.warned = True
        warnings.warn(
            f"this {type(self.model).__name__} is called from a thread without a zinit scope while another thread has "
            f"one open (handle.disabled, route or context). A scope belongs to the thread that opened it; to take it "
            f"along, start the thread with zinit.in_scope(function).",
            stacklevel=2,
        )

    def say_if_frozen(self) -> None:
        """Warns, at the first training step, if other weights of the model train and the adapters that are on do not.

        PEFT's ``get_peft_model`` freezes all but its own.
        """
        self.checked = True
        names = [name for name in self.names_on() if name in self.handles]
        own = [parameter for name in names for parameter in self.handles[name].parameters()]
        if own and not any(p.requires_grad for p in own) and any(p.requires_grad for p in self.model.parameters()):
            warnings.warn(
                f"the adapter {', '.join(map(repr, names))} is on and does not train, but other weights of this "
                f"{type(self.model).__name__} do: something froze it since it was attached (get_peft_model freezes "
                f"all but its own). handle.activate() lets it train.",
                stacklevel=2,
            )

    def check_no_route(self, what: str) -> None:
        """Adapters neither come nor go inside `Handle.route`.

        Raises:
            ConfigError: if a route is open in any thread.
        """
        if self.routes:
            raise ConfigError(f"{what} cannot be done inside handle.route(...). Leave that scope first.")

    def switch_on(self, names: tuple[str, ...]) -> None:
        """Exactly these adapters are on, inside the scopes of this thread too.

        Raises:
            ConfigError: if one of them shares the words' softmax and is not alone at a layer.
        """
        for site, slot in self.slots.items():
            keys = [key for name in names for key in slot.members.get(name, ())]
            joint = [key for key in keys if not slot[key].config.separate_softmax]  # pyright: ignore
            if joint and len(keys) > 1:
                raise ConfigError(
                    f"the adapter {joint[0]!r} shares the words' softmax (separate_softmax=False), which stands alone, "
                    f"but {', '.join(names)} would all be on in {site}. Activate it alone."
                )
        self.on = names
        self.version += 1
        for change in changes_of(self.key):
            if isinstance(change, SwitchOn):
                change.names = names
        refresh(self.key)

    # --- what a slot asks, see `zinit.backbones.base.SlotState` ---

    def names_on(self) -> tuple[str, ...]:
        """The adapters that are on for this thread."""
        scope = self.scope()
        return self.on if scope.on is None else scope.on

    def tunings_on(self) -> tuple[str, ...]:
        """The adapters whose tuning is on for all samples: none in a route, where each sample has its own."""
        scope = self.scope()
        return () if scope.route is not None else self.on if scope.on is None else scope.on

    def names_at(self, slot: PrefixSlot) -> tuple[str, ...]:
        """The adapters that are on at a slot."""
        return tuple(name for name in self.names_on() if name in slot.members)

    def is_per_sample(self, slot: PrefixSlot) -> bool:
        """Whether samples of the batch differ in their prefix."""
        scope = self.scope()
        return scope.route is not None or any(name in scope.contexts for name in self.names_at(slot))

    def at(self, slot: PrefixSlot, context: Tensor | Context | None = None) -> AtSlot:
        """What is on at a slot, each prefix with its context; and keys and values that were computed ahead, still hold.

        Asked at every call of every layer, so that one token's time counts here: a scope knows what was found last.

        Raises:
            ConfigError: if a context comes with the call and it is not clear whose it is.
        """
        scope = SCOPES.get().get(self.key) or self._without_scope()
        if context is not None or torch.compiler.is_dynamo_compiling():
            return self._resolve(scope, slot, context), None if context is not None else self._ahead(scope, slot)
        if not self.watches_blocks and (torch.is_grad_enabled() or self.sites[slot.site].module.training):
            self.watch(self)  # a call that no hook of `zinit.adapter.calls` has seen
        known = scope.known.get(slot.site)
        if known is not None and known[0]() is slot and known[1] == self.version:
            return known[2]
        found = self._resolve(scope, slot, None), self._ahead(scope, slot)
        scope.known[slot.site] = (weakref.ref(slot), self.version, found)
        return found

    def _ahead(self, scope: Scope, slot: PrefixSlot) -> tuple[Any, Any] | None:
        if scope.cached is None or scope.cached.version != self.version:
            return None
        return scope.cached.pairs.get(slot.site)

    def _resolve(self, scope: Scope, slot: PrefixSlot, context: Tensor | Context | None) -> ActivePrefix | None:
        if scope.route is not None:
            if context is not None or scope.contexts.keys() & set(scope.route.samples):
                raise ConfigError(NO_CONTEXT_IN_ROUTE)
            return scope.route.at.get(slot.site)
        names = self.on if scope.on is None else scope.on
        if context is not None:
            self._check_one_takes(names)
        members: list[ActivePrefix] = []
        for name in names:
            takes = self.handles[name].takes_context if name in slot.members else ()
            for key in slot.members.get(name, ()):
                prefix: Any = slot[key]
                own = None
                if key in takes:
                    own = scope.contexts.get(name) if context is None else context
                if own is not None or (self.tuned and prefix.config.prompt != "context"):
                    adapter = name if self.tuned else None
                    members.append(PrefixWithContext(prefix, self.sites[slot.site], own, adapter))
                elif prefix.config.prompt != "context":
                    members.append(prefix)
        return together(members)

    def with_context(self, context: Tensor | Context) -> AbstractContextManager[None]:
        """A scope with a context that came with a call; it goes to the only adapter that takes one.

        Raises:
            ConfigError: if it is not clear whose it is.
        """
        if self.scope().route is not None:
            raise ConfigError(NO_CONTEXT_IN_ROUTE)
        names = self.names_on()
        self._check_one_takes(names)
        taking = [name for name in names if self.handles[name].takes_context]
        return self.handles[taking[0]].context(context) if taking else nullcontext()

    def _check_one_takes(self, names: Sequence[str]) -> None:
        taking = [name for name in names if self.handles[name].takes_context]
        if names and not taking:
            raise ConfigError(
                f"zinit_context came with the call, but {', '.join(names)} take no context: learned keys, values and "
                f"matrices do not; use parametrization='prompt'."
            )
        if len(taking) > 1:
            raise ConfigError(
                f"zinit_context came with the call, and {', '.join(taking)} all take a context. Give each its own with "
                f"handle.context(...)."
            )

    # --- keys and values ahead of time ---

    @contextmanager
    def cached_kv(self, *, keep: bool = False) -> Iterator[None]:
        """See `Handle.cached_kv`. Scopes nest; what the outermost computed is used by the inner ones.

        Args:
            keep: whether routes inside compute each adapter once.
        """
        scope = scope_of(self.key) or self.no_scope
        outer, kept = scope.cached, scope.kept
        holds = outer is not None and outer.version == self.version
        cached = outer if outer is not None and holds else CachedKV(self.version, {})
        if keep and (kept is None or kept.version != self.version):
            kept = Kept(self.version)
        with self.opened(Change(self.key, lambda scope: replace(scope, cached=cached, kept=kept))):
            if not holds:
                cached.pairs.update(self._compute_ahead())
            yield

    def kept(self) -> Kept | None:
        """What routes may use again and add to; None where gradients are wanted, or no `cached_kv` is open."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        kept = self.scope().kept
        return kept if kept is not None and kept.version == self.version else None

    @torch.no_grad()
    def _compute_ahead(self) -> dict[str, tuple[Any, Any]]:
        pairs: dict[str, tuple[Any, Any]] = {}
        for name, slot in self.slots.items():
            host, prefix = self.sites[name].module, self._resolve(self.scope(), slot, None)
            weights = [p for part, p in host.named_parameters() if not part.startswith("zinit.")]
            if prefix is None or any(map(is_shard, weights)):
                continue  # sharded weights are complete only inside the host's own forward
            floating = [weight.dtype for weight in weights if weight.is_floating_point()]
            dtype = floating[0] if floating else self._dtype()  # a quantised module may have integer weights only
            pairs[name] = prefix.keys_values(functools.partial(slot.project_kv, host), dtype)
        return pairs

    def _dtype(self) -> torch.dtype:
        """Of the model's first weight that is no integer."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    # --- undoing ---

    def thaw(self) -> None:
        """What was trained before is trained again; so is what has taken its place since (a resized embedding)."""
        for parameter in self.trained_before.values():
            parameter.requires_grad_(True)
        for name, parameter in self.model.named_parameters():
            if name in self.trained_before:
                parameter.requires_grad_(True)

    def uninstall(self, site: AttentionSite) -> None:
        """Takes the slot of one attention module away."""
        self.backbone.uninstall(self.model, site)
        self.slots.pop(site.name, None)
