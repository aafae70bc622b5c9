"""What bias tuning learns for one module, and the arithmetic with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.config import TuningConfig


class TunedLinear(nn.Module):
    """What is learned for one linear layer: ``y = s * (W x + b) + l2 (l1 x)``, or ``W (s * x) + b``.

    Attributes:
        scale: s, (out,) or (in,); None has none.
        bias: b, (out,).
        lora_down: l1, (r, in); random. ``lora_up``: l2, (out, r); zero.
    """

    def __init__(
        self, config: TuningConfig, widths: tuple[int, int], *, affine: bool, lora: bool, device: Any, generator: Any
    ) -> None:
        super().__init__()
        into, out = widths

        def vector(length: int, value: float, wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.full((length,), value, device=device)) if wanted and affine else None

        self.on_input = config.scale == "input"
        self.scale = vector(into if self.on_input else out, 1.0, config.scale != "none")
        self.bias = vector(out, 0.0, config.bias)
        self.lora_down = self.lora_up = None
        if lora:
            self.lora_down = nn.Parameter(uniform(config.lora_rank, into, device=device, generator=generator))
            self.lora_up = nn.Parameter(torch.zeros(out, config.lora_rank, device=device))


class TunedNorm(nn.Module):
    """A norm's own weight, and bias if it has one: float32 copies of the host's at the start."""

    def __init__(self, norm: nn.Module, device: Any) -> None:
        super().__init__()
        for name, tensor in norm.named_parameters():
            copied = tensor.detach().to(device or tensor.device, torch.float32, copy=True)
            self.register_parameter(name, nn.Parameter(copied))


class NormView:
    """A norm as its own forward sees it with other weights. The module stays as it is: threads share it."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.module, self.weights = module, weights

    def __getattr__(self, name: str) -> Any:
        if name in ("module", "weights"):
            raise AttributeError(name)
        return self.weights[name] if name in self.weights else getattr(self.module, name)


def normalize(norm: nn.Module, weights: Mapping[str, Tensor], args: Sequence[Any]) -> Any:
    """What a norm gives with other weights."""
    return type(norm).forward(NormView(norm, weights), *args)  # pyright: ignore[reportArgumentType]


def scale_and_shift(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``scale * y + shift`` in one pass over y, in its dtype; with s = 1 and b = 0 y bit for bit."""
    scale, shift = (None if x is None else x.to(y.dtype) for x in (scale, shift))
    if shift is None:
        return y if scale is None else y * scale
    return y + shift if scale is None else torch.addcmul(shift, y, scale)


def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``l2 (l1 x)``."""
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def uniform(rank: int, width: int, *, device: Any, generator: torch.Generator | None) -> Tensor:
    """LoRA's usual start of its first matrix, Kaiming's with a = sqrt(5); drawn on the CPU."""
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(rank, width, device="meta")
    bound = width**-0.5
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator).to(device)
