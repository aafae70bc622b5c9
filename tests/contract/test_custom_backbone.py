"""A model author attaches prefixes to a model that zinit has never heard of, without forking anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zinit
from tests.contract.mine import Mine, tiny
from zinit.backbones import BACKBONES


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKBONES, "_where", dict(BACKBONES._where))
    zinit.register_backbone("mine", "tests.contract.mine:MINE")


@torch.no_grad()
def run(model: Mine) -> torch.Tensor:
    return model(torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(6)))


def test_unregistered_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    del BACKBONES._where["mine"]
    with pytest.raises(zinit.BackboneError, match="no backbone knows Mine"):
        zinit.attach(tiny())


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    model = tiny()
    frozen, keys = run(model), list(model.state_dict())
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, layers=2))
    assert handle.backbone == "mine"
    assert list(handle.prefixes) == ["mixers.1", "mixers.2"]
    assert handle.num_trainable == 2 * (3 * 24 + 6)
    assert torch.equal(run(model), frozen)

    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
        (model(torch.randn(2, 5, 24)) * torch.randn(2, 5, 24)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in handle.state_dict().items())
    learned = run(model)
    assert not torch.equal(learned, frozen)
    with handle.disabled():
        assert torch.equal(run(model), frozen)
    with handle.frozen_prefix():
        assert torch.equal(run(model), learned)
    with handle.context(torch.ones(2, 1, 24)):
        assert not torch.equal(run(model), learned)

    handle.save(tmp_path)
    fresh = tiny()
    zinit.load(fresh, tmp_path)
    assert torch.equal(run(fresh), learned)

    handle.detach()
    assert torch.equal(run(model), frozen)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
