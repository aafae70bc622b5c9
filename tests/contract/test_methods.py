"""Every method on every backbone: what trains is what it says, and with it switched off the model is the frozen one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tests.contract.cases import Case
from zinit.adapter.encoding import Features
from zinit.config import ROLES, PrefixConfig
from zinit.errors import ConfigError
from zinit.methods import METHODS
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.methods.rates import LearningRate, rate_settings
from zinit.runs.config import RunConfig
from zinit.train.config import TrainConfig

PREFIX = PrefixConfig(length=3)
SHORT = {"prefix": {"length": 3}}
OWN = {name: SHORT for name in METHODS if not METHODS.fact(name, "defaults").get("parts")}
NEAR_ZERO = {"hyper-prompts"}  # prompts that start at about 1e-5: their gradients and their gates' are as small
FEATURES = 8  # width of the features of images
REFUSED = {  # method: backbones that it cannot be used on, and why
    "bitfit": {"llama": "no bias terms"},
    "adaption-prompt": dict.fromkeys(("roberta", "clip", "vit", "transformers"), "AdaptionPrompt knows llama"),
    "prompt-tuning": {"vit": "one sequence of tokens", "clip": "one sequence of tokens"},
    "peft-prefix-tuning": {
        **dict.fromkeys(("roberta", "clip", "vit"), "knows causal language models"),
        "transformers": r"\(3, 2, 8\) from .* has \(3, 4, 8\)",  # a config with a number that its model does not read
    },
}


def refusal(name: str, case: Case) -> str | None:
    return REFUSED.get(name, {}).get(case.backbone)


def adapt(name: str, model: nn.Module, case: Case) -> tuple[Method, Adapted]:
    """With the settings that the method begins with; sources of contexts are made for `FEATURES`."""
    method: Method = METHODS.get(name)(METHODS.get(name).Config())
    run = RunConfig.from_dict(
        {"backbone": case.backbone, "task": {"name": "alpaca"}, "method": name, **OWN.get(name, {})}
    )
    given = {"feature_width": FEATURES} if run.context else {}
    adapter = replace(run.adapter(), context_options={**run.context_options, **given})
    return method, method.apply(model, ApplyContext(prefix=PREFIX, adapter=adapter, backbone=case.backbone, seed=0))


@contextmanager
def seen(adapted: Adapted, batch: Any) -> Iterator[None]:
    """The adapter gets features of an image for each sample, where it takes some."""
    if adapted.handle is None or "context" not in adapted.handle.shared:
        yield
        return
    count = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
    drawn = torch.randn(count, 3, FEATURES, generator=torch.Generator().manual_seed(5))
    with adapted.handle.given(features=Features(tokens=drawn, pooled=drawn[:, 0], layers=(drawn[:, 0],))):
        yield


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(params=sorted(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_off_it_is_the_frozen_model_and_on_it_learns(name: str, leader: Case) -> None:
    model, batch = leader.build(), leader.batch("left")
    with torch.no_grad():
        before = leader.output(model, batch)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    if (reason := refusal(name, leader)) is not None:
        with pytest.raises(ConfigError, match=reason):
            adapt(name, model, leader)
        return
    _, adapted = adapt(name, model, leader)
    with torch.no_grad():
        with adapted.disabled():
            assert torch.equal(leader.output(adapted.model, batch), before)
        if adapted.handle is not None and name not in ("random-gate", "prefix-tuning"):  # gates, biases, scales: closed
            with seen(adapted, batch):
                assert torch.equal(leader.output(adapted.model, batch), before)
    trained = trainable(adapted.model)
    if name in ("head-only", "logistic-regression"):
        assert not trained
        return
    assert trained
    start = {key: value.detach().clone() for key, value in trained.items()}
    slow = name in NEAR_ZERO
    optimizer = torch.optim.Adam(trained.values(), lr=0.01) if slow else torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(20 if slow else 3):  # some weights only move once others have
        with seen(adapted, batch):
            loss = (leader.output(adapted.model, batch) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {key for key, value in trained.items() if not torch.equal(value, start[key])}
    assert len(moved) > len(trained) / 2
    if name not in ("full", "bitfit"):
        frozen = dict(adapted.model.named_parameters())
        for key, value in untouched.items():
            own = [parameter for other, parameter in frozen.items() if plain(other) == key]
            assert all(torch.equal(parameter, value) for parameter in own)
        with torch.no_grad(), adapted.disabled():
            assert torch.equal(leader.output(adapted.model, batch), before)


def plain(name: str) -> str:
    """A parameter's name without what PEFT puts into it."""
    return name.removeprefix("base_model.").replace(".base_layer.", ".")


def test_a_seed_decides_everything(name: str, leader: Case) -> None:
    if refusal(name, leader) is not None:
        pytest.skip("refused")
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        model = leader.build()
        torch.manual_seed(noise)
        _, adapted = adapt(name, model, leader)
        states.append({key: value.detach().clone() for key, value in trainable(adapted.model).items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_sizes_are_those_of_the_arithmetic(leader: Case) -> None:
    """K x C + H per site; LoRA r x (in + out) per projection; bottleneck 2 x C x m + C + m."""
    from zinit.backbones import BACKBONES

    def size(name: str) -> int:
        _, adapted = adapt(name, leader.build(), leader)
        return sum(parameter.numel() for parameter in trainable(adapted.model).values())

    sites = BACKBONES.get(leader.backbone).sites(leader.build())
    assert size("zero-init") == size("random-gate") == sum(3 * site.width + site.num_heads for site in sites)
    assert size("prefix-tuning") == sum(3 * site.width for site in sites)
    matrices = sum(site.num_heads * site.head_dim * (site.value_dim or site.head_dim) for site in sites)
    assert size("prefix-tuning-plus") == matrices
    assert size("bottleneck") == sum(2 * site.width * 16 + site.width + 16 for site in sites)
    named = [site.module.get_submodule(part) for site in sites for part in site.query_value]
    if named:
        parts: list[Any] = named
        assert size("lora") == sum(8 * (part.in_features + part.out_features) for part in parts)
    if refusal("bitfit", leader) is None:
        biases = [p for key, p in leader.build().named_parameters() if key.rpartition(".")[2] == "bias"]
        assert size("bitfit") == sum(bias.numel() for bias in biases)
    if refusal("prompt-tuning", leader) is None:
        assert size("prompt-tuning") == 3 * sites[0].width
    if refusal("peft-prefix-tuning", leader) is None:
        assert size("peft-prefix-tuning") == sum(2 * 3 * site.num_kv_heads * site.head_dim for site in sites)
    assert size("full") == sum(parameter.numel() for parameter in leader.build().parameters())


def test_every_role_that_trains_has_a_rate_of_known_origin(name: str, leader: Case) -> None:
    """Roles as `Task.groups` tells them apart: those of a handle, and the rest as the head."""
    own = METHODS.get(name)
    assert set(own.default_rates) <= set(ROLES)
    assert all(math.isfinite(rate.value) and rate.value > 0 for rate in own.default_rates.values())
    assert all(len(rate.source.split()) > 2 for rate in own.default_rates.values())
    settings = TrainConfig.from_dict(rate_settings(own.default_rates))
    for role, rate in own.default_rates.items():
        assert settings.learning_rate * settings.rates.factor("main", role) == pytest.approx(rate.value)
    if name == "logistic-regression" or refusal(name, leader) is not None:  # the first trains by no rate
        return
    _, adapted = adapt(name, leader.build(), leader)
    roles = {} if adapted.handle is None else adapted.handle.roles()
    assert {role for role, parameters in roles.items() if parameters} | {"head"} <= set(own.default_rates)


def test_the_prefix_trains_at_the_rate_of_the_loop() -> None:
    assert rate_settings(METHODS.get("zero-init").default_rates) == {"learning_rate": TrainConfig().learning_rate}
    for name in ("random-gate", "prefix-tuning"):  # ablations change one thing
        assert METHODS.get(name).default_rates == METHODS.get("zero-init").default_rates


def test_rates_by_role_become_factors() -> None:
    class Two(METHODS.get("lora")):
        default_rates: ClassVar = {"gates": LearningRate(0.03, "a"), "head": LearningRate(0.003, "b")}

    assert rate_settings(Two.default_rates) == {"learning_rate": 0.03, "rates": {"head": 0.1}}
