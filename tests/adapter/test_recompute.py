"""When the hooks that recomputation needs are there, and what a call sees that came before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zinit
from tests.contract.cases import causal_lm
from zinit.errors import ConfigError

OPEN = zinit.PrefixConfig(length=3, layers=2, gate_init=0.5)


def tuned() -> zinit.AdapterConfig:
    return zinit.AdapterConfig(parts={}, tuning=zinit.TuningConfig(bias=True, scale="output"))


@pytest.mark.parametrize("config", [OPEN, tuned()], ids=["prefix", "tuning"])
def test_a_model_that_only_answers_has_no_hooks_on_its_blocks(config: Any) -> None:
    model: Any = causal_lm("Llama").eval()
    zinit.attach(model, config, seed=0)
    ids = torch.ones(1, 3, dtype=torch.long)
    before = [len(layer._forward_pre_hooks) for layer in model.model.layers]
    model.generate(input_ids=ids, max_new_tokens=2)
    assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == before == [0, 0, 0]
    model(input_ids=ids)
    assert any(len(layer._forward_pre_hooks) for layer in model.model.layers)


def test_layers_of_a_later_adapter_are_watched_too() -> None:
    model: Any = causal_lm("Llama").train()
    ids = torch.ones(1, 3, dtype=torch.long)
    zinit.attach(model, zinit.PrefixConfig(length=3, layers=(2,)), name="one")
    model(input_ids=ids)
    zinit.attach(model, zinit.PrefixConfig(length=3, layers=(0,)), name="two")
    model(input_ids=ids)
    assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == [1, 0, 1]


def test_a_block_entered_from_the_side_is_watched_from_the_middle_of_its_first_call() -> None:
    model: Any = causal_lm("Llama").train()
    handle = zinit.attach(model, OPEN, seed=0)
    block, states = model.model.layers[2], torch.randn(1, 4, 32, requires_grad=True)
    cosines = torch.ones(1, 4, model.config.head_dim)

    def call(states: Tensor) -> Tensor:
        return block(states, position_embeddings=(cosines, torch.zeros_like(cosines)))

    with handle.disabled():
        output: Any = checkpoint(lambda states: call(states) + 0, states * 2, use_reentrant=False)
    with pytest.raises(ConfigError, match="computed again in the backward pass"):
        output.sum().backward()
    with handle.disabled():
        expected = torch.autograd.grad(call(states * 2).sum(), states)[0]
        output = checkpoint(call, states * 2, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(output.sum(), states)[0], expected)  # seen as it was, though on by now


def test_a_tuning_alone_is_recomputed_as_it_was() -> None:
    model: Any = causal_lm("Llama").train()
    handle = zinit.attach(model, tuned(), seed=0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    model.get_input_embeddings().weight.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with handle.disabled():
            loss = model(**batch).logits.square().sum()
        loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("config", [OPEN, tuned()], ids=["prefix", "tuning"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_step_inside_a_route_is_seen_by_layers_that_are_computed_again(config: Any, use_reentrant: bool) -> None:
    """A reentrant checkpoint runs its layer without gradients first: nothing that was kept must be used there."""
    model: Any = causal_lm("Llama").train()
    handles = [zinit.attach(model, config, name=name, seed=seed) for seed, name in enumerate("ab")]
    handles[0].activate()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])

    def step() -> dict[str, Tensor]:
        for parameter in handles[0].parameters():
            parameter.grad = None
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in handles[0].named_parameters() if p.grad is not None}}

    with handles[0].route(["a", "b"]):
        before = step()
        with torch.no_grad():
            for parameter in handles[0].parameters():
                parameter.mul_(-2).add_(0.3)
        after = step()
    with handles[0].route(["a", "b"]):
        expected = step()
    assert abs(float(before["loss"] - expected["loss"])) > 1e-3
    assert all(torch.equal(after[name], value) for name, value in expected.items())
