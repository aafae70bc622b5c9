"""Bias tuning in a route: scales, biases, LoRA and norms of several adapters on the samples of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.adapter.bias_modules import TunedLinear, TunedNorm, normalize, scale_and_shift
from zinit.adapter.tuning import Samples, TunedCall
from zinit.backbones.base import random_like


class LinearStack:
    """A linear layer's tunings of several adapters; see `zinit.adapter.bias_modules.TunedLinear`.

    LoRA's matrices of all adapters stand side by side, and of what comes between them a sample keeps its own.

    Args:
        on: {adapter: what is learned for it}.
        module: the host's own.

    Attributes:
        numbers: {adapter: its row below}, from 1; row 0 changes nothing.
        input_scale: (1 + A, C) for A adapters, or None; ``scale`` and ``shift`` alike.
        down: (ranks of all, C), or None.
        up: (C, ranks of all), or None.
        owner: for each rank the number of its adapter.
    """

    def __init__(self, on: Mapping[str, TunedLinear], module: nn.Module) -> None:
        self.numbers = {adapter: 1 + index for index, adapter in enumerate(on)}
        host = next(module.parameters())
        dtype = host.dtype if host.is_floating_point() else torch.float32
        learned = list(on.values())
        self.device = next(p.device for own in learned for p in own.parameters())
        self.input_scale = _cast(_stack([own.scale if own.on_input else None for own in learned], 1.0), dtype)
        scale = _stack([None if own.on_input else own.scale for own in learned], 1.0)
        shift = _stack([own.bias for own in learned], 0.0)
        self.shift = _cast(shift if scale is None or shift is None else scale * shift, dtype)
        self.scale = _cast(scale, dtype)
        ranks = [(index, own) for index, own in enumerate(learned, 1) if own.lora_down is not None]
        self.down = self.up = None
        self.owner = [index for index, own in ranks for _ in range(len(own.lora_down))]  # pyright: ignore
        if ranks:
            self.down = torch.cat([own.lora_down for _, own in ranks]).to(dtype)  # pyright: ignore
            self.up = torch.cat([own.lora_up for _, own in ranks], dim=1).to(dtype)  # pyright: ignore

    def of(self, samples: Samples) -> LinearBySample:
        """Each sample's own."""
        return LinearBySample(self, samples)


class LinearBySample:
    """A linear layer in a route.

    Args:
        stack: what adapters have learned for it.
        samples: of the route.
    """

    def __init__(self, stack: LinearStack, samples: Samples) -> None:
        self.samples, self.down, self.up, self.own = samples, None, None, None
        rows = samples.numbers(stack.numbers, stack.device)
        self.input_scale, self.scale, self.shift = (
            None if x is None else x.index_select(0, rows) for x in (stack.input_scale, stack.scale, stack.shift)
        )
        numbers = {stack.numbers.get(name) for name in set(samples.names) if name is not None}
        ranks = [rank for rank, number in enumerate(stack.owner) if number in numbers]
        if ranks and stack.down is not None and stack.up is not None:
            index = torch.tensor(ranks, device=stack.device)
            self.down, self.up = stack.down.index_select(0, index), stack.up.index_select(1, index)
            self.own = torch.tensor([stack.owner[rank] for rank in ranks], device=stack.device) == rows[:, None]

    def changed_input(self, call: TunedCall) -> tuple[Any, ...]:
        """``s * x``."""
        x, *rest = call.args
        if self.input_scale is None:
            return call.args
        return (scale_and_shift(x, *self.samples.spread(x, self.input_scale, None)), *rest)

    def changed(self, call: TunedCall, output: Any) -> Any:
        """``s * (y + b) + l2 (l1 x)``."""
        output = scale_and_shift(output, *self.samples.spread(output, self.scale, self.shift))
        if self.down is None or self.up is None or self.own is None:
            return output
        between = F.linear(call.args[0], self.down.to(call.args[0].dtype))
        [own] = self.samples.spread(between, self.own)
        between = torch.where(own, between, 0)
        return output + F.linear(between, self.up.to(between.dtype)).to(output.dtype)


class NormStack:
    """A norm's tunings of several adapters; see `zinit.adapter.bias_modules.TunedNorm`.

    Args:
        on: {adapter: what is learned for it}.
        module: the host's own.

    Attributes:
        numbers: {adapter: its row below}, from 1; row 0 is the host's own.
        weights: {adapter: {name: weight}}.
        together: {name: (1 + A, C)} for A adapters; None where the norm takes no weights by sample.
    """

    def __init__(self, on: Mapping[str, TunedNorm], module: nn.Module) -> None:
        self.numbers = {adapter: 1 + index for index, adapter in enumerate(on)}
        self.module = module
        hosts = dict(module.named_parameters())
        self.device = next(iter(hosts.values())).device
        self.weights = {
            adapter: {name: getattr(own, name).to(host.dtype) for name, host in hosts.items()}
            for adapter, own in on.items()
        }
        self.together: dict[str, Tensor] | None = None
        if takes_weights_by_sample(module):
            self.together = {
                name: torch.stack([host, *(own[name] for own in self.weights.values())]) for name, host in hosts.items()
            }

    def of(self, samples: Samples) -> NormBySample:
        """Each sample's own."""
        return NormBySample(self, samples)


class NormBySample:
    """A norm in a route. Adapters are gone through one by one where it asks for that.

    Args:
        stack: what adapters have learned for it.
        samples: of the route.
    """

    def __init__(self, stack: NormStack, samples: Samples) -> None:
        self.samples, self.module = samples, stack.module
        self.weights = {adapter: own for adapter, own in stack.weights.items() if adapter in samples.names}
        self.together: dict[str, Tensor] | None = None
        if stack.together is not None:
            rows = samples.numbers(stack.numbers, stack.device)
            self.together = {name: own.index_select(0, rows) for name, own in stack.together.items()}

    def changed_input(self, call: TunedCall) -> tuple[Any, ...]:
        """As it is."""
        return call.args

    def changed(self, call: TunedCall, output: Any) -> Any:
        """What the norm gives with each sample's own weights."""
        x, *rest = call.args
        if self.together is not None:
            weights = self.samples.spread(x, *self.together.values())
            return normalize(self.module, dict(zip(self.together, weights, strict=True)), call.args)
        self.samples.check(x)
        for adapter, weights in self.weights.items():
            rows = torch.tensor(list(self._rows(adapter, len(x))), device=x.device)
            own = normalize(self.module, weights, (x.index_select(0, rows), *rest))
            output = output.index_copy(0, rows, own)
        return output

    def _rows(self, adapter: str, batch: int) -> Iterator[int]:
        """The rows of an adapter's samples."""
        beams = batch // len(self.samples.names)
        for index, name in enumerate(self.samples.names):
            if name == adapter:
                yield from range(index * beams, (index + 1) * beams)


def _stack(vectors: Sequence[Tensor | None], neutral: float) -> Tensor | None:
    """The vectors of A adapters to (1 + A, C), the neutral ones first; None if nobody has one."""
    some = next((vector for vector in vectors if vector is not None), None)
    if some is None:
        return None
    none = torch.full_like(some, neutral)
    return torch.stack([none, *(none if x is None else x for x in vectors)])


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


_TRIED: dict[type[nn.Module], bool] = {}


def takes_weights_by_sample(norm: nn.Module) -> bool:
    """Whether norms of this class multiply by whatever weights fit, so (B, 1, C) too; tried once on a few numbers.

    LLaMA's do, torch's LayerNorm does not.
    """
    if type(norm) not in _TRIED:
        _TRIED[type(norm)] = _try(norm)
    return _TRIED[type(norm)]


@torch.no_grad()
def _try(norm: nn.Module) -> bool:
    hosts = dict(norm.named_parameters())
    weights = {name: random_like(host, 2, *host.shape) for name, host in hosts.items()}
    x = random_like(next(iter(hosts.values())), 2, 3, *next(iter(hosts.values())).shape)
    try:
        together = normalize(norm, {name: own[:, None] for name, own in weights.items()}, (x,))
    except RuntimeError:
        return False
    alone = [normalize(norm, {name: own[row] for name, own in weights.items()}, (x[row : row + 1],)) for row in (0, 1)]
    return torch.equal(together, torch.cat(alone))
