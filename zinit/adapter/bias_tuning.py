"""Bias tuning (LLaMA-Adapter V2, section 3.1): scales and biases of linear layers, weights of norms, optional LoRA.

The host's product runs first and its own weights are never replaced: what is learned acts on the input or the output
of a module, by hooks. So a quantised or sharded host needs nothing special, and the start is the host bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.bias_by_sample import LinearStack, NormStack
from zinit.adapter.bias_modules import TunedLinear, TunedNorm, low_rank, normalize, scale_and_shift
from zinit.adapter.tuning import TunedCall, TunedStack, Tuning, build_tuning, place
from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import linears_of, norms_of, widths_of
from zinit.config import TuningConfig
from zinit.errors import ConfigError


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
            place(self, path, module)

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
        scale = _together([own.scale for own in tuned if own.on_input and own.scale is not None], 1.0)
        x, *rest = call.args
        return (scale_and_shift(x, scale, None), *rest)

    @classmethod
    def changed(cls, on: Sequence[Any], call: TunedCall, output: Any) -> Any:
        """``s * (y + b)`` and LoRA's addition of a linear layer; a norm's output with the learned weights."""
        if isinstance(on[0].at(call.name), TunedNorm):
            return _normalize([one.at(call.name) for one in on if _reaches(one, call.of_prompts)], call, output)
        tuned = _linears(on, call.name, call.of_prompts)
        bias = _together([own.bias for own in tuned if own.bias is not None], 0.0)
        scale = _together([own.scale for own in tuned if own.scale is not None and not own.on_input], 1.0)
        output = scale_and_shift(output, scale, bias if scale is None or bias is None else scale * bias)
        if not call.of_prompts:
            for own in tuned:
                if own.lora_down is not None and own.lora_up is not None:
                    output = output + low_rank(call.args[0], own.lora_down, own.lora_up).to(output.dtype)
        return output

    @classmethod
    def stacked(cls, on: Mapping[str, Any], name: str, module: nn.Module) -> TunedStack:
        """The scales, biases, LoRA and weights of several adapters."""
        learned = {adapter: tuning.at(name) for adapter, tuning in on.items()}
        kind = NormStack if isinstance(next(iter(learned.values())), TunedNorm) else LinearStack
        return kind(learned, module)


def _linears(on: Sequence[BiasTuning], name: str, of_prompts: bool) -> list[TunedLinear]:
    return [one.at(name) for one in on if _reaches(one, of_prompts)]


def _reaches(tuning: BiasTuning, of_prompts: bool) -> bool:
    return not of_prompts or tuning.config.prompts_through == "bias-scale"


def _together(tensors: Sequence[Tensor], neutral: float) -> Tensor | None:
    """What several adapters come to: ``neutral + sum(x_i - neutral)``; None if there are none."""
    if not tensors:
        return None
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + (tensor - neutral)
    return total


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
    return normalize(call.module, weights, call.args)


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
