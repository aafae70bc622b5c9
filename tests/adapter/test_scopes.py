"""One model, several threads: a scope belongs to the thread that opened it, in transformers and timm alike."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zinit
from tests.contract.cases import CASES, Case
from tests.contract.checks import run
from tests.contract.test_generation import nothing_is_kept

HOSTS = [next(case for case in CASES if case.name == name) for name in ("llama", "vit", "roberta")]


@pytest.fixture(params=HOSTS, ids=str)
def host(request: pytest.FixtureRequest) -> Case:
    return request.param


def adapted(case: Case) -> Any:
    model = case.build()
    for seed, name in enumerate(("a", "b")):
        zinit.attach(model, zinit.PrefixConfig(length=4, gate_init=0.8), name=name, seed=seed)
    return model


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each function gives in a thread of its own; errors come back too."""
    results: list[Any] = [None] * len(works)

    def call(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def alone(case: Case, model: Any, name: str | None) -> Tensor:
    with zinit.get_handle(model, "a").route([name]):
        return run(case, model)


def test_two_routes_at_the_same_time(host: Case) -> None:
    """Both scopes are open before either runs, and both run before either closes."""
    model = adapted(host)
    expected = {name: alone(host, model, name) for name in ("a", "b", None)}
    barrier = threading.Barrier(2, timeout=60)

    def work(name: str) -> list[Tensor]:
        with zinit.get_handle(model, "a").route([name]):
            barrier.wait()
            found = [run(host, model) for _ in range(3)]
            barrier.wait()
        barrier.wait()
        return found

    for name, found in zip("ab", in_threads(lambda: work("a"), lambda: work("b")), strict=True):
        assert all(torch.equal(output, expected[name]) for output in found)
    assert nothing_is_kept(model)
    assert torch.equal(run(host, model), expected["b"])  # the active one


def test_disabled_in_one_thread_and_adapted_in_another(host: Case) -> None:
    model = adapted(host)
    handle = zinit.get_handle(model, "b")
    on, off = run(host, model), alone(host, model, None)
    barrier = threading.Barrier(2, timeout=60)

    def without() -> Tensor:
        with handle.disabled():
            barrier.wait()
            found = run(host, model)
            barrier.wait()
        return found

    def with_adapter() -> Tensor:
        barrier.wait()
        with handle.cached_kv():  # a scope of its own: no warning
            found = run(host, model)
        barrier.wait()
        return found

    first, second = in_threads(without, with_adapter)
    assert torch.equal(first, off)
    assert torch.equal(second, on)


def test_four_threads_in_one_model(host: Case) -> None:
    """Calls that overlap within a forward pass do not mix: each waits in the middle until all are there."""
    model = adapted(host)
    expected = run(host, model)
    barrier = threading.Barrier(4, timeout=60)
    site = zinit.get_handle(model, "b").sites[1].module

    def wait(module: Any, args: Any) -> None:
        barrier.wait()

    hook = site.register_forward_pre_hook(wait)
    try:
        for found in in_threads(*[lambda: run(host, model)] * 4):
            assert torch.equal(found, expected)
    finally:
        hook.remove()


def test_overlapping_scopes_each_take_away_their_own(host: Case) -> None:
    """Closed in the order they were opened, not the reverse."""
    model = adapted(host)
    handle = zinit.get_handle(model, "b")
    before = run(host, model)
    first, second = (torch.full((3, 1, host.width), value) for value in (0.5, -1.0))
    with handle.context(second):
        of_second = run(host, model)
    one, two = handle.context(first), handle.context(second)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(run(host, model), of_second)
    two.__exit__(None, None, None)
    assert torch.equal(run(host, model), before)
    assert nothing_is_kept(model)


def test_a_thread_without_a_scope_warns_once_and_can_take_one_along(host: Case) -> None:
    model = adapted(host)
    handle = zinit.get_handle(model, "b")
    off = alone(host, model, None)
    with handle.disabled():
        with pytest.warns(UserWarning, match=r"zinit\.in_scope"):
            in_threads(lambda: run(host, model))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            in_threads(lambda: run(host, model))  # once is enough
        (found,) = in_threads(zinit.in_scope(lambda: run(host, model)))
    assert torch.equal(found, off)


def test_a_copy_has_scopes_of_its_own(host: Case) -> None:
    model = adapted(host)
    on = run(host, model)
    twin = copy.deepcopy(model)
    with zinit.get_handle(model, "b").disabled():
        assert torch.equal(run(host, twin), on)
        inside = copy.deepcopy(model)
    assert torch.equal(run(host, inside), on)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(host, again), on)
    with torch.no_grad():
        for parameter in zinit.get_handle(again, "b").parameters():
            parameter.zero_()
    assert torch.equal(run(host, again), alone(host, model, None))
    assert torch.equal(run(host, model), on)


def test_a_replica_uses_its_own_prefix(host: Case) -> None:
    """Made the way `torch.nn.DataParallel` makes one: shallow copies of all modules, with parameters of their own."""
    model = adapted(host)
    on, off = run(host, model), alone(host, model, None)
    replica = replicate(model)
    for name, parameter in zinit.get_handle(model, "b").named_parameters():
        assert name
        with torch.no_grad():
            parameter.zero_()
    assert torch.equal(run(host, model), off)
    assert torch.equal(run(host, replica), on)


def replicate(model: Any) -> Any:
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            twin._parameters[name] = None if parameter is None else torch.nn.Parameter(parameter.detach().clone())
    return copies[model]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_sees_its_forward_pass(host: Case, reentrant: bool) -> None:
    """The context's scope has closed and the adapter is off by the time of the backward pass; two calls wait for it."""
    found = [gradients(host, checkpointing, reentrant) for checkpointing in (False, True)]
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-5)


def gradients(case: Case, checkpointing: bool, reentrant: bool) -> dict[str, Tensor]:
    model = adapted(case).train()
    handle = zinit.get_handle(model, "a")
    handle.activate()
    if checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # the reentrant kind asks for it
    context = torch.randn(3, 1, case.width, generator=torch.Generator().manual_seed(5))
    with handle.context(context):
        first = case.output(model, case.batch("none")).square().sum()
    second = case.output(model, case.batch("none")).square().sum()
    with handle.disabled():
        (first + 3 * second).backward()
    return {name: p.grad.clone() for name, p in handle.named_parameters() if p.grad is not None}
