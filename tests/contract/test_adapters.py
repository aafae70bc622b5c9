"""What every backbone promises of several adapters on one model, of copies and of files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import zinit
from tests.contract.cases import Case
from tests.contract.checks import OPEN, VARIANTS, WITHOUT_GATE, assert_same, loss_of, run, set_implementation, snapshot
from zinit.errors import ConfigError

# --- several adapters, copies -------------------------------------------------------------------------------------


def test_several_adapters_take_turns(case: Case) -> None:
    model = case.build()
    before, frozen = snapshot(model), run(case, model)
    first = zinit.attach(model, OPEN, name="first", seed=0)
    of_first = run(case, model)
    second = zinit.attach(model, zinit.PrefixConfig(length=3, layers=(0,), gate_init=0.7), name="second", seed=1)
    of_second = run(case, model)
    assert (second.active, first.active) == (True, False)
    assert not torch.equal(of_first, of_second)
    loss_of(case, model).backward()
    assert all(parameter.grad is None for parameter in first.parameters())
    assert all(parameter.grad is not None for parameter in second.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert not any(parameter.requires_grad for parameter in first.parameters())
    first.activate()
    assert torch.equal(run(case, model), of_first)
    assert (second.active, first.active) == (False, True)
    with first.disabled():
        assert torch.equal(run(case, model), frozen)
    second.activate()
    first.detach()
    assert torch.equal(run(case, model), of_second)
    assert zinit.get_handle(model, "second") is second
    second.detach()
    assert_same(snapshot(model), before)
    assert torch.equal(run(case, model), frozen)


def test_detaching_the_active_adapter_leaves_the_frozen_model(case: Case) -> None:
    model = case.build()
    frozen = run(case, model)
    first = zinit.attach(model, OPEN, name="first", seed=0)
    of_first = run(case, model)
    zinit.attach(model, OPEN, name="second", seed=1).detach()
    assert torch.equal(run(case, model), frozen)
    first.activate()
    assert torch.equal(run(case, model), of_first)


def test_attaching_inside_disabled(case: Case) -> None:
    """The scope ends cleanly although the model has another adapter in another layer by then."""
    model = case.build()
    first = zinit.attach(model, zinit.PrefixConfig(length=5, layers=1, gate_init=0.7), name="first", seed=0)
    with first.disabled():
        second = zinit.attach(model, zinit.PrefixConfig(length=5, gate_init=0.7), name="second", seed=1)
    assert (first.active, second.active) == (False, True)
    output = run(case, model)
    second.activate()
    assert torch.equal(run(case, model), output)
    first.activate()
    assert first.active


def test_a_copy_is_independent(case: Case) -> None:
    model = case.build()
    frozen = run(case, model)
    handle = zinit.attach(model, OPEN)
    output = run(case, model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(case, twin), output)
    theirs = zinit.get_handle(twin)
    assert theirs is not handle
    assert theirs.model is twin
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    assert not torch.equal(run(case, twin), output)
    assert torch.equal(run(case, model), output)
    theirs.detach()
    assert torch.equal(run(case, twin), frozen)
    assert torch.equal(run(case, model), output)
    if case.implementations:
        set_implementation(twin, case.implementations[-1])
        assert model.config._attn_implementation == case.implementations[0]  # pyright: ignore
    handle.detach()
    assert torch.equal(run(case, model), frozen)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, *WITHOUT_GATE])
def test_saved_and_loaded_it_is_the_same(case: Case, variant: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = (VARIANTS | WITHOUT_GATE)[variant]
    model = case.build()
    handle = zinit.attach(model, config)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))
    handle.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    kinds = {"key_value": ["key", "value"], "prompt": ["prompt.weight"]}[config.parametrization]
    kinds = kinds + ["gate"] * config.gating
    assert set(saved) == {f"{site.name}.{kind}" for site in handle.sites for kind in kinds}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors", "adapter.json"}

    fresh = case.build()
    loaded = zinit.load(fresh, tmp_path)
    assert loaded.config == config
    assert torch.equal(run(case, fresh), run(case, model))
    for name, tensor in handle.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_loading_beside_another_adapter(case: Case, tmp_path: Path) -> None:
    model = case.build()
    first = zinit.attach(model, OPEN, name="first")
    output = run(case, model)
    first.save(tmp_path)
    second = zinit.load(model, str(tmp_path), name="second")
    assert torch.equal(run(case, model), output)
    assert second.active
    with pytest.raises(ConfigError, match="'second' already"):
        zinit.load(model, tmp_path, name="second")
    assert second.active


def test_state_is_not_shared_with_the_model(case: Case, tmp_path: Path) -> None:
    """What is loaded is copied in: the parameters stay the objects that an optimizer holds."""
    handle = zinit.attach(case.build(), OPEN)
    before = [id(parameter) for parameter in handle.parameters()]
    handle.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in handle.state_dict().items()})
    assert [id(parameter) for parameter in handle.parameters()] == before
    assert all(not parameter.any() for parameter in handle.parameters())
