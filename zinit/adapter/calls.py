"""What belongs to one call of a module: a scope until it returns, and a context that comes with the call.

``model(..., zinit_context=context)`` is `Handle.context` for one call. It is taken off where the model is entered, so
that it reaches every layer, whether or not the layers in between hand arguments on.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zinit.adapter.state import AdapterState

ARGUMENT = "zinit_context"
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


def entries(site: str) -> list[str]:
    """The modules that an attention module may be entered through: those above its repeated blocks, the model first."""
    parts = site.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return [".".join(parts[:index]) for index in range(first + 1)]


def watch_calls(state: AdapterState, site: str) -> None:
    """Puts hooks on the modules that an attention module may be entered through."""
    for name in entries(site):
        module = state.model.get_submodule(name)
        if name not in state.entry_hooks and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            state.entry_hooks[name] = module.register_forward_pre_hook(ContextOfCall(state), with_kwargs=True)


def unwatch_calls(state: AdapterState) -> None:
    """Takes them off a model that has no prefix any more."""
    if state.slots:
        return
    for hook in state.entry_hooks.values():
        hook.remove()
    state.entry_hooks.clear()


class ContextOfCall:
    """The hook on a module that a call may enter the model through.

    Args:
        state: the model's.

    Attributes:
        only_takes_context: without a context the call is what it was, see `zinit.compat.has_forward_hooks`.
    """

    only_takes_context = True

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments without the context, which is a scope until the module returns.

        Raises:
            ConfigError: if it is not clear whose context it is.
        """
        if ARGUMENT not in kwargs or torch.compiler.is_compiling():  # a compiled model hands it on
            return None
        kwargs = dict(kwargs)
        context = kwargs.pop(ARGUMENT)
        if context is not None:
            until_return(module, self.state.with_context(context))
        return args, kwargs
