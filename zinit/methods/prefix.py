"""Zero-init attention (LLaMA-Adapter), alone and with V2's bias tuning, and what tells which part of it does what.

The gate starts at random; no gate at all; the tuning without prompts; PEFT's form of the gate.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from zinit.adapter.attach import attach, load
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.methods import defaults, rates
from zinit.methods.base import Adapted, ApplyContext, Method


class ZeroInit(Method):
    """Zero-init attention: gated prompts in every layer, with the run's ``prefix`` settings as they are."""

    name = "zero-init"
    default_rates = rates.ZERO_INIT
    takes_parts = True

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        """What the method makes of a prefix's settings."""
        return prefix

    def attached(self, adapter: AdapterConfig) -> AdapterConfig:
        try:
            return replace(adapter, parts={name: self.variant(part) for name, part in adapter.parts.items()})
        except ConfigError as error:
            raise ConfigError(f"with what the method {self.name!r} sets by itself: {error}") from error

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        if context.saved is not None:
            handle = load(model, context.saved, encoder=context.encoder)
        else:
            config = self.attached(context.attached).simplest()
            handle = attach(model, config, backbone=context.backbone, seed=context.seed, encoder=context.encoder)
        return Adapted(model=model, handle=handle, disabled=handle.disabled)


class RandomGate(ZeroInit):
    """The same prompts with gates that start at N(0, 1), the paper's ablation of zero-init."""

    name = "random-gate"

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        return replace(prefix, gating=True, separate_softmax=True, gate_init="random")


class PrefixTuning(ZeroInit):
    """Plain prefix tuning: the same prompts without a gate, in one softmax with the words."""

    name = "prefix-tuning"

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        return replace(prefix, gating=False, separate_softmax=False)


class GatedPrefixTuning(ZeroInit):
    """Prefix tuning behind a zero-init gate: each head's output goes from the host's to plain prefix tuning's. Ours."""

    name = "gated-prefix-tuning"

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        return replace(prefix, gating=True, separate_softmax=False)


class AdaptionPromptRecipe(ZeroInit):
    """The same prompts as PEFT's AdaptionPrompt has them: N(0, 1), one gate per layer, as it stands (no tanh)."""

    name = "adaption-prompt-recipe"
    default_rates = rates.ADAPTION_PROMPT

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        form = {"gate": "identity", "gate_per": "layer", "gate_init": 0.0, "init_std": 1.0, "parametrization": "prompt"}
        return replace(prefix, gating=True, separate_softmax=True, **form)


class TunedZeroInit(ZeroInit):
    """Zero-init attention with V2's bias tuning: scales and biases of all linear layers, and the norms."""

    name = "zero-init-tuned"
    defaults = defaults.TUNED


class BiasTuning(ZeroInit):
    """V2's bias tuning (arXiv 2304.15010, section 3.1) without any prompts."""

    name = "bias-tuning"
    defaults = defaults.TUNED

    def attached(self, adapter: AdapterConfig) -> AdapterConfig:
        return replace(adapter, parts={})


class HyperPrompts(ZeroInit):
    """Zero-init attention whose prompts one small network makes for all layers (arXiv 2502.03029)."""

    name = "hyper-prompts"
    defaults = defaults.HYPER_PROMPTS


class QueryGate(ZeroInit):
    """Zero-init attention with a gate for each query (arXiv 2502.03029), the rotated one where the host rotates."""

    name = "query-gate"
    defaults = defaults.QUERY_GATE


class PrefixTuningPlus(ZeroInit):
    """Prefix-Tuning+ (arXiv 2506.13674): the prefix as a bias by the query, elu(q_h) M_h, outside of the softmax.

    M starts at zero, which needs no gate; that is ours (see `zinit.prefix.ZeroGatedPrefix`). There are no prompts, so
    ``prefix.length`` says nothing.
    """

    name = "prefix-tuning-plus"
    default_rates = rates.MATRICES

    def variant(self, prefix: PrefixConfig) -> PrefixConfig:
        form = {"parametrization": "matrix", "length": PrefixConfig.length, "init_std": 0.0, "gating": False}
        return replace(prefix, separate_softmax=True, **form)
