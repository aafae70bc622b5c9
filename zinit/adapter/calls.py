"""What comes with one call of a model: a context.

``model(..., zinit_context=context)`` is `Handle.context` for one call. It is taken off where the model is entered, so
that it reaches every layer, whether or not the layers in between hand arguments on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.scopes import until_return
from zinit.adapter.state import AdapterState
from zinit.prefix import Context

ARGUMENT = "zinit_context"


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
    if state.slots or state.tuned:
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
        if not self.state.watches_blocks and (module.training or torch.is_grad_enabled()):
            self._watch()
        if ARGUMENT not in kwargs:
            return None
        kwargs = dict(kwargs)
        context = kwargs.pop(ARGUMENT)
        if context is not None and torch.compiler.is_compiling():
            from zinit.adapter.uncompiled import outside_graph  # the compiler comes with it

            outside_graph(_take, module, self.state, context)
        elif context is not None:
            _take(module, self.state, context)
        return args, kwargs

    def _watch(self) -> None:
        if not torch.compiler.is_compiling():
            self.state.watch(self.state)


def _take(module: nn.Module, state: AdapterState, context: Tensor | Context) -> None:
    until_return(module, state.with_context(context))
