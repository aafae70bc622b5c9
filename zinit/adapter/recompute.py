"""Layers that are computed again in the backward pass see what their forward pass saw.

Gradient checkpointing runs a block twice: in the forward pass, and again when its gradient is needed. By then a scope
may have closed, another adapter may be active, and autograd may run in a thread of its own, which has no scopes. So
what was on is carried along: by the checkpointing function of the block where it has one of its own (transformers), and
else by the block's input, which checkpointing keeps (timm).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zinit import compat
from zinit.adapter.scopes import Scope, replaced, until_return
from zinit.errors import ConfigError

if TYPE_CHECKING:
    from zinit.adapter.state import AdapterState


def blocks_around(site: str) -> list[str]:
    """The repeated blocks that an attention module is in, by its path: "layers.0", "layers.0.blocks.1"."""
    parts = site.split(".")
    return [".".join(parts[: index + 1]) for index, part in enumerate(parts[:-1]) if part.isdigit()]


def watch(state: AdapterState) -> None:
    """Puts hooks on the blocks around what is adapted: at the first call that may be computed again.

    A model that only answers has none, because every call of a module with a hook costs.
    """
    state.watches_blocks = True
    for name in {block: None for module in (*state.slots, *state.tuned) for block in blocks_around(module)}:
        if name not in state.block_hooks:
            block, calls = state.model.get_submodule(name), BlockCalls(state)
            state.block_hooks[name] = block.register_forward_pre_hook(calls.before, with_kwargs=True, prepend=True)
            calls.last = on_in(state.snapshot())  # a block that is running by now was entered with this on


def unwatch(state: AdapterState) -> None:
    """Takes all these hooks off a model that has no prefix any more."""
    if state.slots or state.tuned:
        return
    for name, hook in state.block_hooks.items():
        compat.unwrap_checkpointing(state.model.get_submodule(name), CarryScope)
        hook.remove()
    state.block_hooks.clear()
    state.watches_blocks = False


def on_in(scope: Scope) -> tuple[Any, ...]:
    """What is on in a scope, as far as the backward pass needs to know."""
    return scope.on, bool(scope.contexts), scope.route is not None


class CarryScope:
    """A block's checkpointing function that puts the scope of the forward pass back when the block is computed again.

    Args:
        state: the model's.
        checkpoint: the function that the block had.
    """

    def __init__(self, state: AdapterState, checkpoint: Callable[..., Any]) -> None:
        self.state, self.checkpoint = state, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints a function; see `torch.utils.checkpoint.checkpoint`."""
        scope = self.state.snapshot()

        def inside(*args: Any, **kwargs: Any) -> Any:
            with replaced(self.state.key, scope):
                return function(*args, **kwargs)

        return self.checkpoint(inside, *args, **kwargs)


def _first_tensor(*given: Any) -> Tensor | None:
    return next((x for x in given if isinstance(x, Tensor)), None)


class BlockCalls:
    """What was on at the calls of one block that may be computed again, by their input.

    Args:
        state: the model's.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state
        self.seen: dict[Hashable, tuple[Any, Scope]] = {}
        self.last: tuple[Any, ...] | None = None  # what was on at the last call, as far as backward needs to know
        self.purge_at = 64

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": {}, "last": None}  # inputs are this process's

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the forward pass, notes what is on; in the backward pass, puts it back."""
        if not (torch.is_grad_enabled() or block.training) or torch.compiler.is_compiling():
            return
        if not self.state.checked and block.training and torch.is_grad_enabled():
            self.state.say_if_frozen()
        compat.wrap_checkpointing(block, lambda checkpoint: CarryScope(self.state, checkpoint), CarryScope)
        first = args[0] if args else None
        given = first if isinstance(first, Tensor) else _first_tensor(*args, *kwargs.values())
        if given is None:
            return
        call = compat.storage_key(given)
        if call is None:  # inside a transformation of torch.func
            return
        if not compat.is_in_backward():
            self._note(call, given)
            return
        found = self.seen.get(call)
        if found is None or found[0].expired():  # of memory that is in use for something else by now
            self._check_nothing_differs(block)
            return
        until_return(block, replaced(self.state.key, found[1]))

    def _note(self, call: Hashable, given: Tensor) -> None:
        if len(self.seen) >= self.purge_at:  # inputs that nobody keeps will not come again
            self.seen = {key: noted for key, noted in self.seen.items() if not noted[0].expired()}
            self.purge_at = max(64, 2 * len(self.seen))
        scope = self.state.snapshot()
        self.seen[call] = (compat.storage_reference(given), scope)
        self.last = on_in(scope)

    def _check_nothing_differs(self, block: nn.Module) -> None:
        """An input that is not known again is of no matter without scopes.

        It was moved to the CPU meanwhile, say, or a larger piece of the model is computed again as a whole.
        """
        now = self.state.names_on()
        scopes = [scope for reference, scope in self.seen.values() if not reference.expired()]
        differs = any(scope.on != now or scope.contexts or scope.route for scope in (*scopes, self.state.snapshot()))
        if differs or self.last not in (None, (now, False, False)):
            raise ConfigError(
                f"{type(block).__name__} is computed again in the backward pass, and its input does not tell which of "
                f"several calls it was: adapters or contexts changed in between. Run forward and backward pass in one "
                f"scope, or pass the context with the call: model(..., zinit_context=context)."
            )
