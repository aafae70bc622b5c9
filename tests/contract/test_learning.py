"""What every backbone promises of training: gradients, contexts, checkpointing, low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zinit
from tests.contract.cases import Case
from tests.contract.checks import CLOSED, OPEN, gradients, loss_of, run
from zinit.errors import ConfigError


def test_gates_move_first_then_prompts_and_never_the_base(case: Case) -> None:
    model = case.build().train()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    handle = zinit.attach(model, CLOSED)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    assert {id(p) for p in handle.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    for step, expected in ((1, {"gate"}), (2, {"gate", "prompt.weight"})):
        before = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
        loss_of(case, model).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, tensor in handle.state_dict().items() if not torch.equal(tensor, before[name])}
        for site in handle.prefixes:
            assert {name[len(site) + 1 :] for name in moved if name.startswith(f"{site}.")} == expected, (site, step)
    for name, parameter in base.items():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_learning_makes_the_loss_fall(case: Case) -> None:
    model = case.build().train()
    handle = zinit.attach(model, CLOSED)
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.05)
    losses: list[float] = []
    for _ in range(20):
        loss = loss_of(case, model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] - losses[-1] > 0.02


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-tensors", "reentrant"])
def test_gradient_checkpointing_agrees(case: Case, reentrant: bool) -> None:
    if not case.implementations:
        pytest.skip("no activation checkpointing of transformers' kind")
    model: Any = case.build().train()
    handle = zinit.attach(model, OPEN, seed=0)
    loss_of(case, model).backward()
    plain = gradients(handle)
    model.zero_grad()
    counted: list[int] = []
    handle.sites[-1].module.register_forward_hook(lambda *_: counted.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and "input_ids" not in case.batch("none"):  # torch's own condition; transformers sees to it for text
        model.enable_input_require_grads()
    loss_of(case, model).backward()
    assert len(counted) == 2, "the layer was not recomputed"
    for name, grad in gradients(handle).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_context_reaches_every_layer_and_gets_a_gradient(case: Case, checkpointing: bool) -> None:
    model: Any = case.build().train()
    if checkpointing and not case.implementations:
        pytest.skip("no activation checkpointing of transformers' kind")
    handle = zinit.attach(model, OPEN)
    batch = case.batch("none")
    size = next(iter(batch.values())).shape[0]
    without = loss_of(case, model)
    context = torch.randn(size, 1, case.width, requires_grad=True)
    try:
        loss = loss_of(case, model, zinit_context=context)
    except TypeError:
        pytest.skip("this model's forward takes no further keywords")
    assert loss.item() != pytest.approx(without.item(), abs=1e-6)
    loss.backward()
    assert context.grad is not None
    plain, of_adapter = context.grad.clone(), gradients(handle)
    assert all(row.abs().max() > 0 for row in plain)
    with handle.context(context):
        torch.testing.assert_close(loss_of(case, model), loss)
    assert loss_of(case, model).item() == without.item()
    if checkpointing:
        model.zero_grad()
        context.grad = None
        model.activation_checkpointing_enable()
        loss_of(case, model, zinit_context=context).backward()
        assert context.grad is not None
        torch.testing.assert_close(context.grad, plain, atol=1e-6, rtol=1e-5)
        for name, grad in gradients(handle).items():
            torch.testing.assert_close(grad, of_adapter[name], atol=1e-6, rtol=1e-5)


def test_each_sample_sees_its_own_context(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN)
    size = next(iter(case.batch("none").values())).shape[0]
    context = torch.randn(size, 5, case.width)
    with handle.context(context):
        before = run(case, model, "none")
    context[0] += 1
    with handle.context(context):
        after = run(case, model, "none")
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=1e-5)


def test_contexts_nest_and_belong_to_one_adapter(case: Case) -> None:
    model = case.build()
    first = zinit.attach(model, OPEN, name="first", seed=0)
    second = zinit.attach(model, OPEN, name="second", seed=1)
    size = next(iter(case.batch("none").values())).shape[0]
    one, two = torch.randn(2, size, 1, case.width)
    plain = run(case, model)
    with first.context(one):
        assert torch.equal(run(case, model), plain), "another adapter's context was used"
    with second.context(one):
        outer = run(case, model)
        with second.context(two):
            assert not torch.equal(run(case, model), outer)
        assert torch.equal(run(case, model), outer)
    assert torch.equal(run(case, model), plain)


def test_a_wrong_context_is_refused(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN)
    for shape in ((3, case.width), (3, 2, case.width), (3, 1, case.width + 1)):
        with pytest.raises(ConfigError, match="context must be"), handle.context(torch.zeros(shape)):
            pass
        if case.implementations:
            with pytest.raises(ConfigError, match="context must be"):
                run(case, model, zinit_context=torch.zeros(shape))
    handle.detach()
    handle = zinit.attach(model, zinit.PrefixConfig(length=5, parametrization="key_value", gate_init=1.0))
    with pytest.raises(ConfigError, match="take no context"), handle.context(torch.zeros(3, 1, case.width)):
        pass
    if case.implementations:
        with pytest.raises(ConfigError, match="take no context"):
            run(case, model, zinit_context=torch.zeros(3, 1, case.width))


def test_a_bfloat16_host_trains_a_float32_adapter(case: Case) -> None:
    model = case.build().to(torch.bfloat16).train()
    handle = zinit.attach(model, OPEN, seed=0)
    exact = case.build().train()
    reference = zinit.attach(exact, OPEN, seed=0)
    loss_of(case, model).backward()
    loss_of(case, exact).backward()
    expected = gradients(reference)
    for name, grad in gradients(handle).items():
        assert grad.dtype == torch.float32
        cosine = torch.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name
    before = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
    torch.optim.SGD(handle.parameters(), lr=1e-4).step()  # a step that bfloat16 parameters would round away
    assert all(not torch.equal(tensor, before[name]) for name, tensor in handle.state_dict().items())


def test_autocast_agrees(case: Case) -> None:
    model = case.build().train()
    handle = zinit.attach(model, OPEN, seed=0)
    loss_of(case, model).backward()
    exact = gradients(handle)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(case, model)
    loss.backward()
    for name, grad in gradients(handle).items():
        assert grad.dtype == torch.float32
        assert torch.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0) > 0.98, name


def test_autocast_with_a_closed_gate_changes_no_bit(case: Case) -> None:
    model = case.build()
    with torch.autocast("cpu", torch.bfloat16):
        frozen = run(case, model)
        zinit.attach(model, CLOSED)
        assert torch.equal(run(case, model), frozen)
