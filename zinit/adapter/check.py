"""A ready check for whoever describes a model: does the backbone keep its promises?"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.attach import attach, get_handle
from zinit.adapter.handle import Handle
from zinit.config import PrefixConfig
from zinit.errors import BackboneError, first_line


def check_backbone(model: nn.Module, *args: Any, backbone: str | None = None, **kwargs: Any) -> int:
    """Attaches a prefix everywhere, tries it, and takes it off again.

    A closed gate changes no bit; an open one changes the output; every gate and prompt gets a gradient; what is
    computed ahead for a generation is the same; a disabled adapter changes no bit; copies of the model (deepcopy,
    torch.save) use their own prefixes; two threads do not mix; detaching restores everything. Prompts in
    one softmax with the words are refused with a `BackboneError`, or their gate is heeded too.

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

    def run(called: nn.Module = model) -> Tensor:
        return _first_tensor(called(*args, **kwargs))

    with torch.no_grad():
        base = run()
    try:
        with _attached(model, PrefixConfig(length=3), backbone) as handle:
            sites, demand = len(handle.prefixes), _Demand(f"the backbone {handle.backbone!r} on {type(model).__name__}")
            _check_attached(handle, run, base, demand)
        model.eval()
        with torch.no_grad():
            demand(torch.equal(run(), base), "detaching must give the model's own output again")
        demand(_parts(model) == parts, "detaching must leave the model's own parts only")
        demand([p.requires_grad for p in model.parameters()] == trained, "detaching must restore what is trained")
        with _attached(model, PrefixConfig(length=3, separate_softmax=False), backbone) as handle, torch.no_grad():
            _check_one_softmax(handle, run, base, demand)
    finally:
        model.train(training)
    return sites


@contextmanager
def _attached(model: nn.Module, config: PrefixConfig, backbone: str | None) -> Iterator[Handle]:
    handle = attach(model, config, backbone=backbone, seed=0)
    try:
        yield handle
    finally:
        handle.detach()


class _Demand:
    """Says which promise is broken.

    Args:
        what: that makes the promise.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, kept: bool, promise: str) -> None:
        if not kept:
            raise BackboneError(f"{self.what}: {promise}.")


def _check_attached(handle: Handle, run: Callable[..., Tensor], base: Tensor, demand: _Demand) -> None:
    demand(torch.equal(run(), base), "a closed gate must change no bit of the output")
    for prefix in handle.prefixes.values():
        prefix.gate.data.fill_(0.5)  # at zero the prompts have no gradient yet: gates move first
    opened = run()
    demand(not torch.equal(opened, base), "open gates must change the output")
    if opened.requires_grad:
        opened.float().square().sum().backward()
    for name, parameter in handle.named_parameters():
        demand(parameter.grad is not None and bool(parameter.grad.any()), f"{name} gets no gradient")
        parameter.grad = None
    opened = opened.detach()
    with torch.no_grad():
        with handle.cached_kv():
            demand(torch.allclose(run(), opened, rtol=1e-3, atol=1e-4), "a prefix computed ahead must do the same")
        with handle.disabled():
            demand(torch.equal(run(), base), "a disabled adapter must change no bit of the output")
        _check_copies(handle, run, base, demand)
        _check_threads(handle, run, base, demand)


def _check_one_softmax(handle: Handle, run: Callable[..., Tensor], base: Tensor, demand: _Demand) -> None:
    """Prompts in one softmax with the words are refused, or their gate is heeded."""
    try:
        closed = run()
    except BackboneError:
        return
    demand(torch.equal(closed, base), "in one softmax with the words too, a closed gate must change no bit")
    for prefix in handle.prefixes.values():
        prefix.gate.data.fill_(0.5)
    demand(not torch.equal(run(), base), "in one softmax with the words too, open gates must change the output")


def _check_copies(handle: Handle, run: Callable[..., Tensor], base: Tensor, demand: _Demand) -> None:
    """A copy whose gates are closed is the base model; the original is not touched by it."""
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "a copy": copy.deepcopy,
        "a saved model": lambda model: pickle.loads(pickle.dumps(model)),  # as torch.save does it
    }
    for what, make in ways.items():
        try:
            twin = make(handle.model)
        except Exception as error:  # whatever a model raises that holds a function
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise BackboneError(f"{demand.what}: {what} cannot be made ({reason}).") from error
        for prefix in get_handle(twin, handle.name).prefixes.values():
            prefix.gate.data.zero_()
        demand(torch.equal(run(twin), base), f"{what} must use its own prefixes")


def _check_threads(handle: Handle, run: Callable[..., Tensor], base: Tensor, demand: _Demand) -> None:
    """One thread has switched the adapter off, one has it on; they meet before every attention module."""
    opened, barrier = run(), threading.Barrier(2, timeout=60)
    results: dict[str, Tensor] = {}

    def meet(module: nn.Module, args: Any) -> None:
        barrier.wait()

    def work(name: str, scope: AbstractContextManager[None]) -> None:
        with scope, torch.no_grad():
            results[name] = run()

    hooks = [site.module.register_forward_pre_hook(meet) for site in handle.sites]
    try:
        scopes = {"off": handle.disabled(), "on": handle.cached_kv()}
        threads = [threading.Thread(target=work, args=item) for item in scopes.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for hook in hooks:
            hook.remove()
    same = results.keys() == scopes.keys() and torch.equal(results["off"], base)
    demand(same and torch.allclose(results["on"], opened, rtol=1e-3, atol=1e-4), "two threads must not mix")


def _parts(model: nn.Module) -> list[str]:
    return [*(name for name, _ in model.named_modules()), *model.state_dict()]


def _first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor of a tuple, a list or a dictionary such as transformers gives."""
    values = [output] if isinstance(output, Tensor) else [*(output.values() if isinstance(output, dict) else output)]
    return next(value for value in values if isinstance(value, Tensor))
