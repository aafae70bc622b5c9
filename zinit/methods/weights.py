"""Methods that train weights which are there already: all of them, the biases, or none but the task's head."""

from __future__ import annotations

from torch import nn

from zinit.errors import ConfigError
from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method


class HeadOnly(Method):
    """The task's head on the frozen model (linear probing by gradient descent)."""

    name = "head-only"
    default_rates = rates.HEAD_ONLY

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        model.requires_grad_(False)
        return Adapted(model=model)


class Full(Method):
    """Full fine-tuning: every weight, and the head."""

    name = "full"
    default_rates = rates.FULL
    trains_host = True

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        model.requires_grad_(True)
        return Adapted(model=model)


class BitFit(Method):
    """BitFit (Ben Zaken et al., ACL 2022): the bias terms, and the head."""

    name = "bitfit"
    default_rates = rates.BITFIT
    trains_host = True

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        model.requires_grad_(False)
        biases = [bias for part in model.modules() if isinstance(bias := getattr(part, "bias", None), nn.Parameter)]
        if not biases:
            raise ConfigError(f"{type(model).__name__} has no bias terms, so the method bitfit has nothing to train.")
        for bias in biases:
            bias.requires_grad_(True)
        return Adapted(model=model)
