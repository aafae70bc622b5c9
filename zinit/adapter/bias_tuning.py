"""Bias tuning (LLaMA-Adapter V2, section 3.1): scales and biases of linear layers, weights of norms, optional LoRA.

The host's product runs first and its own weights are never replaced: what is learned acts on the input or the output
of a module, by hooks. So a quantised or sharded host needs nothing special, and the start is the host bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.adapter.tuning import TunedCall, Tuning, build_tuning
from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import linears_of, norms_of, widths_of
from zinit.config import TuningConfig
from zinit.errors import ConfigError


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
            self.lora_down = nn.Parameter(_uniform(config.lora_rank, into, device=device, generator=generator))
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


class BiasTuning(Tuning):
    """See the module.

    Args:
        config: what is learned.
        modules: {path of a host's module: what is learned for it}.
    """

    def __init__(self, config: TuningConfig, modules: Mapping[str, TunedLinear | TunedNorm]) -> None:
        super().__init__()
        self.config = config
        self._paths = tuple(modules)
        for path, module in modules.items():
            _place(self, path, module)

    def targets(self) -> Sequence[str]:
        """The paths of the linear layers and norms."""
        return self._paths

    def at(self, path: str) -> Any:
        """What is learned for one module."""
        return self.get_submodule(path)

    @property
    def changes_input(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether scales are on the input."""
        return self.config.scale == "input"

    @classmethod
    def changed_input(cls, on: Sequence[Any], call: TunedCall) -> tuple[Any, ...]:
        """``s * x``, where scales are on the input; of several s = 1 + sum(s_i - 1)."""
        if isinstance(on[0].at(call.name), TunedNorm):
            return call.args
        tuned = _linears(on, call.name, call.of_prompts)
        scales = [own.scale for own in tuned if own.on_input and own.scale is not None]
        x, *rest = call.args
        return (x * _together(scales, 1.0).to(x.dtype), *rest) if scales else call.args

    @classmethod
    def changed(cls, on: Sequence[Any], call: TunedCall, output: Any) -> Any:
        """``s * (y + b)`` and LoRA's addition of a linear layer; a norm's output with the learned weights."""
        if isinstance(on[0].at(call.name), TunedNorm):
            return _normalize([one.at(call.name) for one in on if _reaches(one, call.of_prompts)], call, output)
        tuned = _linears(on, call.name, call.of_prompts)
        if biases := [own.bias for own in tuned if own.bias is not None]:
            output = output + _together(biases, 0.0).to(output.dtype)
        if scales := [own.scale for own in tuned if own.scale is not None and not own.on_input]:
            output = output * _together(scales, 1.0).to(output.dtype)
        if not call.of_prompts:
            for own in tuned:
                if own.lora_down is not None and own.lora_up is not None:
                    output = output + _low_rank(call.args[0], own.lora_down, own.lora_up).to(output.dtype)
        return output


def _linears(on: Sequence[BiasTuning], name: str, of_prompts: bool) -> list[TunedLinear]:
    return [one.at(name) for one in on if _reaches(one, of_prompts)]


def _reaches(tuning: BiasTuning, of_prompts: bool) -> bool:
    return not of_prompts or tuning.config.prompts_through == "bias-scale"


def _together(tensors: Sequence[Tensor], neutral: float) -> Tensor:
    """What several adapters come to: ``neutral + sum(x_i - neutral)``."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + (tensor - neutral)
    return total


def _low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _normalize(tuned: Sequence[TunedNorm], call: TunedCall, output: Any) -> Any:
    """A norm's output with the adapter's weights; of several w = w_0 + sum(w_i - w_0)."""
    if not tuned:
        return output
    weights: dict[str, Tensor] = {}
    for name, host in call.module.named_parameters():
        first, *rest = (getattr(one, name) for one in tuned)
        for other in rest:
            first = first + (other - host.to(other.dtype))
        weights[name] = first.to(host.dtype)
    return type(call.module).forward(NormView(call.module, weights), *call.args)  # pyright: ignore[reportArgumentType]


def _uniform(rank: int, width: int, *, device: Any, generator: torch.Generator | None) -> Tensor:
    """LoRA's usual start of its first matrix, Kaiming's with a = sqrt(5); drawn on the CPU."""
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(rank, width, device="meta")
    bound = width**-0.5
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator).to(device)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers a module under a path with dots, so that its parameters are called as the host's are."""
    *above, own = path.split(".")
    for name in above:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(own, module)


@build_tuning.register
def _build(
    config: TuningConfig,
    model: nn.Module,
    sites: Sequence[AttentionSite],
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> BiasTuning:
    affine = linears_of(model, sites, config.linears) if config.bias or config.scale != "none" else {}
    lora = linears_of(model, sites, config.lora_linears or config.linears) if config.lora_rank else {}
    _check_called(sites, [*affine, *lora])
    modules: dict[str, TunedLinear | TunedNorm] = {}
    for path, linear in (affine | lora).items():
        widths = widths_of(linear)
        assert widths is not None
        modules[path] = TunedLinear(
            config,
            widths,
            affine=path in affine,
            lora=path in lora,
            device=device or next(linear.parameters()).device,
            generator=generator,
        )
    norms = norms_of(model, sites, outside=config.norms is True) if config.norms else {}
    return BiasTuning(config, modules | {path: TunedNorm(norm, device) for path, norm in norms.items()})


def _check_called(sites: Sequence[AttentionSite], paths: Sequence[str]) -> None:
    """A layer whose weights its module reads without calling it would be tuned in vain."""
    for site in sites:
        inside = {path.rpartition(".")[2] for path in paths if path.startswith(f"{site.name}.")}
        if site.query_value is None and inside:
            others = [name for name in dict.fromkeys(path.rpartition(".")[2] for path in paths) if name not in inside]
            raise ConfigError(
                f"{site.name} multiplies by its projections' weights without calling them, so they cannot be tuned. "
                f"Choose layers outside of attention: linears={others}."
            )
