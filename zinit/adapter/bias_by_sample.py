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


class LinearBySample:
    """A linear layer; see `zinit.adapter.bias_modules.TunedLinear`.

    LoRA's matrices of all adapters stand side by side, and of what comes between them a sample keeps its own.

    Args:
        on: {adapter: what is learned for it}.
        samples: of the route.
        module: the host's own.
    """

    def __init__(self, on: Mapping[str, TunedLinear], samples: Samples, module: nn.Module) -> None:
        self.samples = samples
        host = next(module.parameters())
        dtype = host.dtype if host.is_floating_point() else torch.float32
        numbers = samples.numbers(on, next(p.device for own in on.values() for p in own.parameters()))

        def each(vectors: Sequence[Tensor | None], neutral: float) -> Tensor | None:
            """(R, C)."""
            some = next((vector for vector in vectors if vector is not None), None)
            if some is None:
                return None
            none = torch.full_like(some, neutral)
            return torch.stack([none, *(none if x is None else x for x in vectors)]).index_select(0, numbers)

        learned = list(on.values())
        self.input_scale = _cast(each([own.scale if own.on_input else None for own in learned], 1.0), dtype)
        scale = each([None if own.on_input else own.scale for own in learned], 1.0)
        shift = each([own.bias for own in learned], 0.0)
        self.shift = _cast(shift if scale is None or shift is None else scale * shift, dtype)
        self.scale = _cast(scale, dtype)
        ranks = [(index, own) for index, own in enumerate(learned, 1) if own.lora_down is not None]
        self.down = self.up = None
        if ranks:
            self.down = torch.cat([own.lora_down for _, own in ranks]).to(dtype)  # pyright: ignore
            self.up = torch.cat([own.lora_up for _, own in ranks], dim=1).to(dtype)  # pyright: ignore
            owner = [index for index, own in ranks for _ in range(len(own.lora_down))]  # pyright: ignore
            self.own = torch.tensor(owner, device=numbers.device) == numbers[:, None]

    def changed_input(self, call: TunedCall) -> tuple[Any, ...]:
        """``s * x``."""
        x, *rest = call.args
        if self.input_scale is None:
            return call.args
        return (scale_and_shift(x, self.samples.spread(self.input_scale, x), None), *rest)

    def changed(self, call: TunedCall, output: Any) -> Any:
        """``s * (y + b) + l2 (l1 x)``."""
        scale, shift = (None if x is None else self.samples.spread(x, output) for x in (self.scale, self.shift))
        output = scale_and_shift(output, scale, shift)
        if self.down is None or self.up is None:
            return output
        between = F.linear(call.args[0], self.down.to(call.args[0].dtype))
        between = torch.where(self.samples.spread(self.own, between), between, 0)
        return output + F.linear(between, self.up.to(between.dtype)).to(output.dtype)


class NormBySample:
    """A norm; see `zinit.adapter.bias_modules.TunedNorm`. Adapters are gone through one by one where it asks for that.

    Args:
        on: {adapter: what is learned for it}.
        samples: of the route.
        module: the host's own.
    """

    def __init__(self, on: Mapping[str, TunedNorm], samples: Samples, module: nn.Module) -> None:
        self.samples, self.module = samples, module
        hosts = dict(module.named_parameters())
        self.weights = {
            adapter: {name: getattr(own, name).to(host.dtype) for name, host in hosts.items()}
            for adapter, own in on.items()
        }
        self.together: dict[str, Tensor] | None = None
        if takes_weights_by_sample(module):
            numbers = samples.numbers(on, next(iter(hosts.values())).device)
            self.together = {
                name: torch.stack([host, *(own[name] for own in self.weights.values())]).index_select(0, numbers)
                for name, host in hosts.items()
            }

    def changed_input(self, call: TunedCall) -> tuple[Any, ...]:
        """As it is."""
        return call.args

    def changed(self, call: TunedCall, output: Any) -> Any:
        """What the norm gives with each sample's own weights."""
        x, *rest = call.args
        if self.together is not None:
            weights = {name: self.samples.spread(own, x) for name, own in self.together.items()}
            return normalize(self.module, weights, call.args)
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
