"""What an adapter may change in the host's own modules besides attention: an interface, and the hooks that serve it.

`zinit.adapter.bias_tuning` is the one there is; another is a class here and a function registered with `build_tuning`.

Several adapters may tune the same module: a tuning says itself what it comes to together with others of its kind.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from zinit.adapter.scopes import prompts_at_hand
from zinit.adapter.state import AdapterState
from zinit.backbones.base import AttentionSite
from zinit.errors import ConfigError


class Tuning(nn.Module, ABC):
    """Learned changes of the host's modules. Its parameters are saved, switched off and detached with its adapter.

    At the start it must change no bit of the output. It holds no reference to the host.
    """

    changes_input = False
    """Whether it has a `changed_input` of its own."""

    @abstractmethod
    def targets(self) -> Sequence[str]:
        """Names of the modules that it changes, as `named_modules` of the host gives them."""

    @classmethod
    def changed_input(cls, on: Sequence[Self], call: TunedCall) -> tuple[Any, ...]:
        """A module's arguments under the tunings that are on; see `changed`."""
        return call.args

    @classmethod
    @abstractmethod
    def changed(cls, on: Sequence[Self], call: TunedCall, output: Any) -> Any:
        """A module's output under the tunings that are on, all of them of this class and with this target.

        Args:
            on: at least one.
            call: of the module.
            output: it gave.
        """


@dataclass(frozen=True, slots=True)
class TunedCall:
    """A call of a module that is tuned.

    Attributes:
        name: the module's.
        module: the host's own.
        args: that reach it.
        of_prompts: whether prompts pass it, not words.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    of_prompts: bool


@functools.singledispatch
def build_tuning(config: Any, model: nn.Module, sites: Sequence[AttentionSite], **options: Any) -> Tuning:
    """A fresh tuning for a host, by the class of its settings.

    Args:
        config: the settings.
        model: the host; it is not changed.
        sites: of the towers that are tuned.
        options: ``device`` (default: beside the host's weights) and ``generator`` for a random start.
    """
    raise ConfigError(f"there is no tuning for the settings {type(config).__name__}.")


class TuningHook:
    """The hooks on a module that adapters tune, before and after its forward.

    Args:
        state: the model's; says which adapters are on.
        name: the module's.
    """

    def __init__(self, state: AdapterState, name: str) -> None:
        self.state, self.name = state, name

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The changed arguments."""
        for kind, on in self._on().items():
            args = kind.changed_input(on, TunedCall(self.name, module, args, prompts_at_hand() is not None))
        return args

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The changed output."""
        for kind, on in self._on().items():
            output = kind.changed(on, TunedCall(self.name, module, args, prompts_at_hand() is not None), output)
        return output

    def _on(self) -> dict[type[Tuning], list[Tuning]]:
        """The tunings that are on here, by their class. An adapter's prompts pass its own only."""
        state, prompts = self.state, prompts_at_hand()
        on = state.tunings_on() if prompts is None else (prompts,)
        kinds: dict[type[Tuning], list[Tuning]] = {}
        for adapter, tuning in state.tuned[self.name].items():
            if adapter in on:
                kinds.setdefault(type(tuning), []).append(tuning)
        return kinds


def install(state: AdapterState, adapter: str, tuning: Tuning | None) -> None:
    """Adds an adapter's tuning, and puts the hooks on again.

    They stand before others that look at what a module gives (timm's seam catches a norm's query), and after others
    that change what it takes (the seam adds the prompts' part to what the output projection takes).
    """
    if tuning is not None:
        for name in tuning.targets():
            state.tuned.setdefault(name, {})[adapter] = tuning
    _put_hooks(state)


def uninstall(state: AdapterState, adapter: str) -> None:
    """Takes an adapter's tuning away, and the hooks that nobody needs any more."""
    for name, tunings in list(state.tuned.items()):
        tunings.pop(adapter, None)
        if not tunings:
            del state.tuned[name]
    _put_hooks(state)


def _put_hooks(state: AdapterState) -> None:
    for hook in state.hooks:
        hook.remove()
    state.hooks.clear()
    for name, tunings in state.tuned.items():
        module, hook = state.model.get_submodule(name), TuningHook(state, name)
        state.hooks.append(module.register_forward_hook(hook.after, prepend=True))
        if any(tuning.changes_input for tuning in tunings.values()):
            state.hooks.append(module.register_forward_pre_hook(hook.before))
