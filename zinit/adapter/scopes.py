"""Scopes: what a thread or task says about a model's adapters for a while, such as `disabled` or `route`.

One model may be used by several threads at a time. So a scope is kept in a context variable, which each thread and each
asyncio task has for itself; the model keeps only what holds for everybody. Scopes may overlap: each takes away what it
brought, in whatever order they end.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zinit.prefix import Context

if TYPE_CHECKING:
    from zinit.backbones.base import ActivePrefix, AtSlot, PrefixSlot

    Known = tuple[weakref.ref[PrefixSlot], int, AtSlot]  # the slot, the version of the adapters, what was found

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CachedKV:
    """Keys and values that were computed ahead, and the version of the adapters that they belong to."""

    version: int
    pairs: dict[str, tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Kept:
    """What routes computed of single adapters, for other routes inside the same `Handle.cached_kv`.

    Attributes:
        version: of the adapters that it belongs to.
        pairs: {(prefix, dtype, autocast's dtype): its keys and values}.
        stacks: {(module, class of tunings): those of several adapters (`zinit.adapter.tuning.TunedStack`)}.
    """

    version: int
    pairs: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    stacks: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Route:
    """Each sample's own adapter.

    Attributes:
        samples: for each an adapter's name or None.
        at: {site: what stands in for its prefixes, or None}.
        tuned: {module: what stands in for its tunings (`zinit.adapter.tuning.TunedSamples`)}, made at the opening.
        version: of the adapters then.
    """

    samples: tuple[str | None, ...]
    at: Mapping[str, ActivePrefix | None]
    tuned: Mapping[str, Sequence[Any]]
    version: int


@dataclass(frozen=True, eq=False)
class Scope:
    """What the open scopes of one thread come to, for one model.

    Attributes:
        on: the adapters that are on; None is whatever is active on the model.
        route: each sample's own adapter; it goes before ``on``.
        contexts: {adapter: its context}.
        cached: keys and values that hold as long as nothing else changes.
        kept: what routes inside need not compute again, whichever adapters they name.
        known: {site: what was found there at the last call, see `zinit.adapter.state.AdapterState.at`}.
    """

    on: tuple[str, ...] | None = None
    route: Route | None = None
    contexts: Mapping[str, Context] = field(default_factory=dict)
    cached: CachedKV | None = None
    kept: Kept | None = None
    known: dict[str, Known] = field(default_factory=dict, init=False)


class Change:
    """One open scope: what it changes. Told apart by identity."""

    def __init__(self, key: int, apply: Callable[[Scope], Scope]) -> None:
        self.key, self.apply = key, apply


class SwitchOn(Change):
    """Exactly these adapters are on; `names` follows an activation that happens inside."""

    def __init__(self, key: int, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(key, lambda scope: replace(scope, on=self.names, route=None, cached=None))


_CHANGES: contextvars.ContextVar[tuple[Change, ...]] = contextvars.ContextVar("zinit_changes", default=())
SCOPES: contextvars.ContextVar[Mapping[int, Scope]] = contextvars.ContextVar("zinit_scopes", default={})  # noqa: B039


def scope_of(key: int) -> Scope | None:
    """What this thread's open scopes come to for a model; None if none is open."""
    return SCOPES.get().get(key)


def changes_of(key: int) -> list[Change]:
    """This thread's open scopes for a model, outermost first."""
    return [change for change in _CHANGES.get() if change.key == key]


def refresh(key: int, changes: tuple[Change, ...] | None = None) -> None:
    """Works out anew what this thread's scopes come to for one model.

    Args:
        key: the model's.
        changes: all open scopes of this thread from now on; None leaves them.
    """
    if changes is None:
        changes = _CHANGES.get()
    _CHANGES.set(changes)
    mine = [change for change in changes if change.key == key]
    others = {known: scope for known, scope in SCOPES.get().items() if known != key}
    if mine:
        others[key] = functools.reduce(lambda scope, change: change.apply(scope), mine, Scope())
    SCOPES.set(others)


@contextmanager
def opened(change: Change) -> Iterator[None]:
    """A scope for this thread or task."""
    refresh(change.key, (*_CHANGES.get(), change))
    try:
        yield
    finally:
        refresh(change.key, tuple(open for open in _CHANGES.get() if open is not change))


@contextmanager
def replaced(key: int, scope: Scope | None) -> Iterator[None]:
    """A scope in which a model sees exactly what a call saw that is computed again."""
    before = SCOPES.get()
    SCOPES.set({known: other for known, other in before.items() if known != key} | ({key: scope} if scope else {}))
    try:
        yield
    finally:
        SCOPES.set(before)


Open = tuple[nn.Module, AbstractContextManager[None], RemovableHandle]
_THREAD = threading.local()  # the calls that this thread is in, innermost last


def until_return(module: nn.Module, scope: AbstractContextManager[None]) -> None:
    """Opens a scope that ends when the module's call does, after an error too; asked for by a pre-hook of it."""
    scope.__enter__()
    # The hook comes only now, because every call of a module with such a hook costs, and most open no scope.
    _open().append((module, scope, module.register_forward_hook(_close, always_call=True)))


def _close(module: nn.Module, args: Any, output: Any) -> None:
    if (stack := _open()) and stack[-1][0] is module:
        _, scope, hook = stack.pop()
        hook.remove()
        scope.__exit__(None, None, None)


def _open() -> list[Open]:
    if not hasattr(_THREAD, "stack"):
        _THREAD.stack = []
    return _THREAD.stack


_PROMPTS: contextvars.ContextVar[str | None] = contextvars.ContextVar("zinit_prompts", default=None)
_TRACED: list[str | None] = [None]  # the same while torch.compile traces, which cannot follow the setting of one


@contextmanager
def prompts_of(adapter: str) -> Iterator[None]:
    """Inside, it is an adapter's prompts that pass the host's modules, not words; "" is no adapter's: the base."""
    if torch.compiler.is_compiling():
        outer = _TRACED[0]
        _TRACED[0] = adapter
        yield
        _TRACED[0] = outer
        return
    outer = _PROMPTS.get()
    _PROMPTS.set(adapter)
    try:
        yield
    finally:
        _PROMPTS.set(outer)


def prompts_at_hand() -> str | None:
    """The adapter whose prompts pass the host's modules now; None where words do."""
    return _TRACED[0] if torch.compiler.is_compiling() else _PROMPTS.get()


def in_scope(function: Callable[P, T]) -> Callable[P, T]:
    """A function that keeps the scopes that are open now, for another thread to call.

    Threads start without any scope. A thread that generates for a streamer, say, takes them along this way.

    Examples:
        >>> with handle.route(["chat"]):  # doctest: +SKIP
        ...     threading.Thread(target=zinit.in_scope(model.generate), kwargs=inputs).start()
    """
    context = contextvars.copy_context()

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(function, *args, **kwargs)

    return inside
