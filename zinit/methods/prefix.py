"""Zero-init attention (LLaMA-Adapter), and two ablations of it: the gate starts at random; no gate at all."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from zinit.adapter.attach import attach, load
from zinit.config import ROLES, PrefixConfig
from zinit.methods.base import Adapted, ApplyContext, LearningRate, Method

PAPER = "the paper's base rate 9e-3, applied as base x batch / 256 with its batch of 64"


class ZeroInit(Method):
    """Zero-init attention: gated prompts in every layer, with the run's ``prefix`` settings as they are."""

    name = "zero-init"
    default_rates = LearningRate.of_roles(9e-3 * 64 / 256, PAPER, *ROLES)  # its ablations change one thing, and no rate

    def settings(self, prefix: PrefixConfig) -> PrefixConfig:
        """What is attached."""
        return prefix

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        if context.saved is not None:
            handle = load(model, context.saved)
        else:
            handle = attach(model, self.settings(context.prefix), backbone=context.backbone, seed=context.seed)
        return Adapted(model=model, handle=handle, disabled=handle.disabled)


class RandomGate(ZeroInit):
    """The same prompts with gates that start at N(0, 1), the paper's ablation of zero-init."""

    name = "random-gate"

    def settings(self, prefix: PrefixConfig) -> PrefixConfig:
        return replace(prefix, gating=True, separate_softmax=True, gate_init="random")


class PrefixTuning(ZeroInit):
    """Plain prefix tuning: the same prompts without a gate, in one softmax with the words."""

    name = "prefix-tuning"

    def settings(self, prefix: PrefixConfig) -> PrefixConfig:
        return replace(prefix, gating=False, separate_softmax=False)
