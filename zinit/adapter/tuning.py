"""What an adapter may change in the host's own modules besides attention: an interface, and the hooks that serve it.

`zinit.adapter.bias_tuning` is the one there is; another is a class here and a function registered with `build_tuning`.

Several adapters may tune the same module: a tuning says itself what it comes to together with others of its kind.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from zinit.adapter.scopes import prompts_at_hand
from zinit.adapter.state import AdapterState
from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import site_beside
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

    @classmethod
    def stacked(cls, on: Mapping[str, Self], name: str, module: nn.Module) -> TunedStack | None:
        """A module's tunings side by side, for routes; None if this class cannot tell samples apart.

        Args:
            on: {adapter: its tuning}, all of this class and with this target.
            name: the module's.
            module: the host's own.
        """
        return None


class TunedStack(Protocol):
    """A module's tunings of several adapters, of which routes take what their samples need.

    Attributes:
        numbers: {adapter: its place}, from 1.
    """

    @property
    def numbers(self) -> Mapping[str, int]: ...

    def of(self, samples: Samples) -> TunedSamples:
        """What they come to in a route."""
        ...


class TunedSamples(Protocol):
    """A module's tunings in a route, where each sample has that of its own adapter, or none."""

    def changed_input(self, call: TunedCall) -> tuple[Any, ...]:
        """The module's arguments; see `Tuning.changed_input`."""
        ...

    def changed(self, call: TunedCall, output: Any) -> Any:
        """The module's output; see `Tuning.changed`. That of a sample without a tuning is the same, bit for bit."""
        ...


@dataclass(frozen=True)
class Samples:
    """A route as one module sees it.

    Attributes:
        names: for each of the R samples an adapter, or None.
        module: its name.
        site: the attention module whose batch is this module's too.
        found: what `numbers` gave before, shared by the modules of a route.
    """

    names: tuple[str | None, ...]
    module: str
    site: AttentionSite
    found: dict[Any, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def in_blocks(self) -> bool:
        """Whether the module is in a layer; beside them a row may be a sample, pooled."""
        return self.module.startswith(f"{self.site.tower}.")

    def numbers(self, of: Mapping[str, int], device: torch.device) -> Tensor:
        """(R,), the number of each sample's adapter; 0 where it has none."""
        key = (*of.items(), device)
        if key not in self.found:
            numbers = [0 if name is None else of.get(name, 0) for name in self.names]
            self.found[key] = torch.tensor(numbers, device=device)
        return self.found[key]

    def spread(self, batch: Tensor, *numbers: Tensor | None) -> list[Any]:
        """(R, C) to (B, 1, ..., C), beside what a module takes or gives: (B, ..., any width); None to None.

        Raises:
            ConfigError: if it is not known which sample a row is of.
        """
        self.check(batch)
        rows, ones = len(batch), [1] * (batch.dim() - 2)
        some = [x if x is None or len(x) in (1, rows) else x.repeat_interleave(rows // len(x), 0) for x in numbers]
        return [None if x is None else x.view(len(x), *ones, -1) for x in some]

    def check(self, batch: Tensor) -> None:
        """Whether it is known which sample each row of (B, ..., any width) is of; raises as `spread` does."""
        if batch.dim() < 3 and len(self.names) > 1 and self.in_blocks:
            raise ConfigError(
                f"{self.module} takes words without their samples, {tuple(batch.shape)}, so a route cannot give each "
                f"sample its own tuning there. Tune other layers (linears=[...]), or call the adapters one by one."
            )
        self.site.check_rows("a route of", len(self.names), len(batch))


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
        for tuned in self._in_route():
            args = tuned.changed_input(TunedCall(self.name, module, args, of_prompts=False))
        for kind, on in self._on().items():
            args = kind.changed_input(on, TunedCall(self.name, module, args, prompts_at_hand() is not None))
        return args

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The changed output."""
        for tuned in self._in_route():
            output = tuned.changed(TunedCall(self.name, module, args, of_prompts=False), output)
        for kind, on in self._on().items():
            output = kind.changed(on, TunedCall(self.name, module, args, prompts_at_hand() is not None), output)
        return output

    def _in_route(self) -> Sequence[TunedSamples]:
        """What words pass in a route: what was made ahead, unless gradients are wanted or adapters have changed."""
        route = self.state.scope().route
        if route is None or prompts_at_hand() is not None:
            return ()
        if torch.is_grad_enabled() or route.version != self.state.version:
            return by_sample(self.state, route.samples, self.name)
        return route.tuned.get(self.name, ())

    def _on(self) -> dict[type[Tuning], list[Tuning]]:
        """The tunings that are on here, by their class. An adapter's prompts pass its own only."""
        state, prompts = self.state, prompts_at_hand()
        on = state.tunings_on() if prompts is None else (prompts,)
        kinds: dict[type[Tuning], list[Tuning]] = {}
        if not on:
            return kinds
        for adapter, tuning in state.tuned[self.name].items():
            if adapter in on:
                kinds.setdefault(type(tuning), []).append(tuning)
        return kinds


def by_sample(
    state: AdapterState, names: Sequence[str | None], module: str, found: dict[Any, Tensor] | None = None
) -> Sequence[TunedSamples]:
    """What a module's tunings come to in a route, one for each class of tunings.

    Args:
        state: the model's.
        names: of the route.
        module: its name.
        found: see `Samples`.

    Raises:
        ConfigError: if one of them cannot tell samples apart.
    """
    wanted = set(names)
    kinds = dict.fromkeys(type(tuning) for adapter, tuning in state.tuned[module].items() if adapter in wanted)
    samples = Samples(tuple(names), module, state.beside[module], {} if found is None else found)
    return [_stack(state, module, kind, wanted).of(samples) for kind in kinds]


def _stack(state: AdapterState, module: str, kind: type[Tuning], wanted: Collection[str | None]) -> TunedStack:
    """The tunings of these adapters, and of others that another route has needed."""
    kept = state.kept()
    found: TunedStack | None = None if kept is None else kept.stacks.get((module, kind))
    of_kind = {adapter: tuning for adapter, tuning in state.tuned[module].items() if type(tuning) is kind}
    before: Collection[str] = () if found is None else found.numbers
    if found is not None and all(adapter in before for adapter in of_kind if adapter in wanted):
        return found
    on = {adapter: tuning for adapter, tuning in of_kind.items() if adapter in wanted or adapter in before}
    made = kind.stacked(on, module, state.model.get_submodule(module))
    if made is None:
        raise ConfigError(
            f"the adapter {next(iter(on))!r} tunes modules of the host ({kind.__name__}), which are the same for "
            f"all samples of a batch, and cannot be part of a route. Activate it and call the model with its "
            f"samples alone."
        )
    if kept is not None:
        kept.stacks[module, kind] = made
    return made


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers a module under a path with dots, so that its parameters are called as the host's are."""
    *above, own = path.split(".")
    for name in above:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(own, module)


def install(state: AdapterState, adapter: str, tuning: Tuning | None) -> None:
    """Adds an adapter's tuning, and puts the hooks on again.

    They stand before others that look at what a module gives (timm's seam catches a norm's query), and after others
    that change what it takes (the seam adds the prompts' part to what the output projection takes).
    """
    if tuning is not None:
        for name in tuning.targets():
            state.tuned.setdefault(name, {})[adapter] = tuning
            if name not in state.beside:
                state.beside[name] = site_beside(name, list(state.sites.values()))
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
