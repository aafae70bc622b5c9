"""What the contract's tests set, run and compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import Case

CLOSED = zinit.PrefixConfig(length=5, layers=2)
OPEN = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7)
VARIANTS: dict[str, zinit.PrefixConfig] = {
    "tanh": CLOSED,
    "identity": zinit.PrefixConfig(length=5, layers=2, gate="identity"),
    "per-layer": zinit.PrefixConfig(length=5, gate_per="layer"),
    "key-value": zinit.PrefixConfig(length=5, layers=2, parametrization="key_value"),
    "joint-gated": zinit.PrefixConfig(length=5, layers=2, separate_softmax=False),
}
WITHOUT_GATE: dict[str, zinit.PrefixConfig] = {
    "ungated": zinit.PrefixConfig(length=5, layers=2, gating=False),
    "joint": zinit.PrefixConfig(length=5, layers=2, gating=False, separate_softmax=False),
}


def set_implementation(model: Any, name: str | None) -> None:
    if name is not None:
        model.set_attn_implementation(name)


def shortened(model: nn.Module) -> nn.Module:
    """A tiny model without the lowest of its three blocks, which `OPEN` leaves alone: each takes a while to trace."""
    containers = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == 3]
    assert containers
    for blocks in containers:
        del blocks[0]
    return model


def each_setting(case: Case) -> Iterator[tuple[str | None, str]]:
    """(attention implementation, padding) of a case."""
    for implementation in case.implementations or (None,):
        for padding in (*case.paddings, "none"):
            yield implementation, padding


@torch.no_grad()
def run(case: Case, model: nn.Module, padding: str = "left", **kwargs: Any) -> Tensor:
    output = case.output(model, case.batch(padding if padding in case.paddings else "none"), **kwargs)
    assert not output.isnan().any()
    return output


def loss_of(case: Case, model: nn.Module, **kwargs: Any) -> Tensor:
    output = case.output(model, case.batch(case.paddings[0] if case.paddings else "none"), **kwargs).float()
    return (output * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).mean()


def gradients(handle: zinit.Handle) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in handle.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that `detach` must restore, and a failed `attach` must not touch."""
    return {
        "class": type(model),
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "configs": {name: id(getattr(module, "config", None)) for name, module in model.named_modules()},
        "forwards": {name: module.forward for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None,  # pyright: ignore
        "generate": getattr(model, "generate", None),
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(now["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(now["state"][name], tensor), name
    for key in before:
        if key != "state":
            assert now[key] == before[key], key
