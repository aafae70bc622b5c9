"""What an adapter may change in the host's own modules besides attention: an interface, and the hooks that serve it.

Several adapters may tune the same module: a tuning says itself what it comes to together with others of its kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from zinit.adapter.state import AdapterState
from zinit.backbones.base import AttentionSite


class Tuning(nn.Module, ABC):
    """Learned changes of the host's modules. Its parameters are saved, switched off and detached with its adapter.

    At the start it must change no bit of the output. It holds no reference to the host.
    """

    @abstractmethod
    def targets(self) -> Sequence[str]:
        """Names of the modules that it changes, as `named_modules` of the host gives them."""

    @classmethod
    @abstractmethod
    def changed(cls, on: Sequence[Self], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A module's output under the tunings that are on, all of them of this class and with this target.

        Args:
            on: at least one.
            name: the module's.
            module: the host's own.
            args: it was called with.
            output: it gave.
        """


class TuningSettings(Protocol):
    """What stands in `zinit.config.AdapterConfig.tuning`."""

    def build(self, model: nn.Module, sites: Sequence[AttentionSite]) -> Tuning:
        """A fresh tuning for a host."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the file."""
        ...


class TuningHook:
    """The one forward hook on a module that adapters tune.

    Args:
        state: the model's; says which adapters are on.
        name: the module's.
    """

    def __init__(self, state: AdapterState, name: str) -> None:
        self.state, self.name = state, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The changed output."""
        kinds: dict[type[Tuning], list[Tuning]] = {}
        for adapter in self.state.tuned.get(self.name, ()):
            tuning: Any = self.state.handles[adapter].tuning
            if adapter in self.state.names_on():
                kinds.setdefault(type(tuning), []).append(tuning)
        for kind, on in kinds.items():
            output = kind.changed(on, self.name, module, args, output)
        return output


def install(state: AdapterState, adapter: str, tuning: Tuning) -> None:
    """Puts a hook on every module that no other adapter tunes yet."""
    for name in tuning.targets():
        if name not in state.tuned:
            hook = state.model.get_submodule(name).register_forward_hook(TuningHook(state, name))
            state.hooks[name] = hook
        state.tuned[name] = (*state.tuned.get(name, ()), adapter)


def uninstall(state: AdapterState, adapter: str) -> None:
    """Takes an adapter's tuning away, and the hooks that nobody needs any more."""
    for name in list(state.tuned):
        left = tuple(other for other in state.tuned[name] if other != adapter)
        if left:
            state.tuned[name] = left
        else:
            del state.tuned[name]
            hook: RemovableHandle = state.hooks.pop(name)
            hook.remove()
