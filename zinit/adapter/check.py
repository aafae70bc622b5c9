"""A ready check for whoever describes a model: does the backbone keep its promises?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.handle import attach
from zinit.config import PrefixConfig
from zinit.errors import BackboneError


def check_backbone(model: nn.Module, *args: Any, backbone: str | None = None, **kwargs: Any) -> int:
    """Attaches a prefix everywhere, tries it, and takes it off again.

    A closed gate changes no bit; an open one changes the output; every gate and prompt gets a gradient; what is
    computed ahead for a generation is the same; a disabled adapter changes no bit; detaching restores everything.

    What this cannot see is a query that is taken too early (before its rotation) or a wrong scale: compare one layer
    with the formula by hand (docs/new-backbone.md).

    Args:
        model: any model that a registered backbone knows; put into evaluation mode for the check.
        args: passed to the model, as ``kwargs``. It must reach every attention module.
        backbone: a registered backbone's name; default: the one that knows the model.
        kwargs: see ``args``.

    Returns:
        How many attention modules took a prefix.

    Raises:
        BackboneError: naming the promise that is broken.
    """
    training = model.training
    model.eval()
    trained, parts = [p.requires_grad for p in model.parameters()], _parts(model)

    def run() -> Tensor:
        return _first_tensor(model(*args, **kwargs))

    with torch.no_grad():
        frozen = run()
    handle = attach(model, PrefixConfig(length=3), backbone=backbone, seed=0)
    what = f"the backbone {handle.backbone!r} on {type(model).__name__}"

    def demand(kept: bool, promise: str) -> None:
        if not kept:
            raise BackboneError(f"{what}: {promise}.")

    try:
        demand(torch.equal(run(), frozen), "a closed gate must change no bit of the output")
        for prefix in handle.prefixes.values():
            prefix.gate.data.fill_(0.5)  # at zero the prompts have no gradient yet: gates move first
        opened = run()
        demand(not torch.equal(opened, frozen), "open gates must change the output")
        if opened.requires_grad:
            opened.float().square().sum().backward()
        for name, parameter in handle.named_parameters():
            demand(parameter.grad is not None and bool(parameter.grad.any()), f"{name} gets no gradient")
        with torch.no_grad(), handle.frozen_prefix():
            demand(torch.allclose(run(), opened, rtol=1e-3, atol=1e-4), "a prefix computed ahead must do the same")
        with handle.disabled():
            demand(torch.equal(run(), frozen), "a disabled adapter must change no bit of the output")
    finally:
        sites = len(handle.prefixes)
        handle.detach()
        model.train(training)
    model.eval()
    with torch.no_grad():
        demand(torch.equal(run(), frozen), "detaching must give the model's own output again")
    model.train(training)
    demand(_parts(model) == parts, "detaching must leave the model's own parts only")
    demand([p.requires_grad for p in model.parameters()] == trained, "detaching must restore what is trained")
    return sites


def _parts(model: nn.Module) -> list[str]:
    return [*(name for name, _ in model.named_modules()), *model.state_dict()]


def _first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor of a tuple, a list or a dictionary such as transformers gives."""
    values = [output] if isinstance(output, Tensor) else [*(output.values() if isinstance(output, dict) else output)]
    return next(value for value in values if isinstance(value, Tensor))
