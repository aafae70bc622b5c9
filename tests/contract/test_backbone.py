"""What every backbone promises, whatever the model: closed gates change nothing, detaching undoes everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import CASES, Case, randomized
from tests.contract.checks import (
    CLOSED,
    OPEN,
    VARIANTS,
    WITHOUT_GATE,
    assert_same,
    each_setting,
    loss_of,
    run,
    set_implementation,
    snapshot,
)
from zinit.backbones import BACKBONES
from zinit.backbones.base import PrefixSlot
from zinit.errors import BackboneError, ConfigError

# --- the table of cases -------------------------------------------------------------------------------------------


def test_every_backbone_has_a_tiny_model() -> None:
    missing = set(BACKBONES) - {case.backbone for case in CASES}
    assert not missing, f"add a tiny model of {', '.join(missing)} to tests/contract/cases.py"


def test_every_family_that_a_backbone_names_has_a_tiny_model() -> None:
    for name in BACKBONES:
        types = {case.build().config.model_type for case in CASES if case.backbone == name and case.implementations}  # pyright: ignore
        missing = set(getattr(BACKBONES.get(name), "model_types", ())) - types
        assert not missing, (
            f"the backbone {name!r} names {', '.join(missing)}: add a tiny model to tests/contract/cases.py"
        )


def test_the_registry_finds_the_backbone(case: Case) -> None:
    handle = zinit.attach(case.build(), CLOSED)
    assert handle.backbone == case.backbone
    assert BACKBONES.get(case.backbone).name == case.backbone
    assert BACKBONES.get(case.backbone).default_task


def test_sites_go_from_the_lowest_layer_up(case: Case) -> None:
    model = case.build()
    sites = BACKBONES.get(case.backbone).sites(model)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    assert [order[site.name] for site in sites] == sorted(order[site.name] for site in sites)
    for site in sites:
        assert model.get_submodule(site.name) is site.module
        assert site.num_heads % site.num_kv_heads == 0
        key, value = site.project_kv(site.module, torch.randn(5, site.width))
        assert key.shape == (1, site.num_kv_heads, 5, site.head_dim)
        assert value.shape == (*key.shape[:-1], site.value_dim or site.head_dim)
        key, value = site.project_kv(site.module, torch.randn(2, 5, site.width))
        assert key.shape == (2, site.num_kv_heads, 5, site.head_dim)
        assert value.shape == (*key.shape[:-1], site.value_dim or site.head_dim)


@pytest.mark.parametrize(
    ("layers", "expected"), [(None, (0, 1, 2)), (2, (1, 2)), (1, (2,)), ((0, 2), (0, 2)), ((1,), (1,))]
)
def test_it_goes_to_the_layers_that_were_asked_for(case: Case, layers: Any, expected: tuple[int, ...]) -> None:
    model = case.build()
    towers: dict[str, list[str]] = {}
    for site in BACKBONES.get(case.backbone).sites(model):
        towers.setdefault(site.tower, []).append(site.name)
    assert all(len(sites) == 3 for sites in towers.values()), "the tiny models have three layers in each tower"
    handle = zinit.attach(model, zinit.PrefixConfig(length=2, layers=layers))
    names = [sites[index] for sites in towers.values() for index in expected]
    assert list(handle.prefixes) == list(handle.gates()) == [site.name for site in handle.sites] == names
    assert [name for name, module in model.named_modules() if isinstance(module, PrefixSlot)] == [
        f"{name}.zinit" for name in names
    ]


# --- a closed gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_closed_gate_changes_no_bit(case: Case, variant: str, dtype: torch.dtype) -> None:
    model = case.build().to(dtype)
    for implementation, padding in each_setting(case):
        set_implementation(model, implementation)
        frozen = run(case, model, padding)
        handle = zinit.attach(model, VARIANTS[variant])
        assert all(parameter.dtype == torch.float32 for parameter in handle.parameters())
        assert torch.equal(run(case, model, padding), frozen), (implementation, padding)
        handle.detach()


def test_a_closed_gate_changes_no_bit_in_training_mode(case: Case) -> None:
    model = case.build().train()
    frozen = case.output(model, case.batch("none")).detach()
    zinit.attach(model, CLOSED)
    assert torch.equal(case.output(model, case.batch("none")).detach(), frozen)


# --- an open gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, *WITHOUT_GATE])
def test_an_open_gate_changes_the_output(case: Case, variant: str) -> None:
    model = case.build()
    for implementation, padding in each_setting(case):
        set_implementation(model, implementation)
        frozen = run(case, model, padding)
        handle = zinit.attach(model, (VARIANTS | WITHOUT_GATE)[variant])
        for name, parameter in handle.named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 0.7)
        assert (run(case, model, padding) - frozen).abs().max() > 1e-2, (implementation, padding)
        handle.detach()


def test_the_implementations_agree(case: Case) -> None:
    outputs: list[Tensor] = []
    for variant in ({}, {"gating": False, "separate_softmax": False}, {"separate_softmax": False}):
        for implementation in case.implementations:
            model = case.build()
            set_implementation(model, implementation)
            zinit.attach(model, zinit.PrefixConfig.from_dict({"length": 5, "gate_init": 0.7} | variant), seed=0)
            outputs.append(run(case, model, "none"))
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], atol=1e-4, rtol=1e-4)
        outputs.clear()


def test_attention_weights_are_still_the_words(case: Case) -> None:
    """`output_attentions` returns what the host computed, whatever the prefix adds."""
    if "eager" not in case.implementations:
        pytest.skip("no attention weights")
    model: Any = case.build()
    model.set_attn_implementation("eager")
    batch = case.batch("none")
    output = model(**batch, output_attentions=True)
    if not hasattr(output, "attentions"):
        pytest.skip("its output has none of its own")
    frozen = output.attentions
    for closed in (CLOSED, VARIANTS["joint-gated"]):
        handle = zinit.attach(model, closed)
        for now, before in zip(model(**batch, output_attentions=True).attentions, frozen, strict=True):
            assert torch.equal(now, before)
        handle.detach()
    zinit.attach(model, OPEN)
    first = model(**batch, output_attentions=True).attentions[0]  # below the adapted layers
    assert torch.equal(first, frozen[0])


def test_the_implementation_may_change_after_attaching(case: Case) -> None:
    for implementation in case.implementations:
        model, fresh = case.build(), case.build()
        zinit.attach(model, OPEN, seed=0)
        set_implementation(model, implementation)
        set_implementation(fresh, implementation)
        zinit.attach(fresh, OPEN, seed=0)
        assert torch.equal(run(case, model), run(case, fresh))


# --- off again ----------------------------------------------------------------------------------------------------


def test_disabled_is_the_frozen_model(case: Case) -> None:
    model = case.build()
    for implementation, padding in each_setting(case):
        set_implementation(model, implementation)
        frozen = run(case, model, padding)
        handle = zinit.attach(model, OPEN)
        changed = run(case, model, padding)
        with handle.disabled():
            assert torch.equal(run(case, model, padding), frozen), (implementation, padding)
        assert torch.equal(run(case, model, padding), changed)
        handle.detach()


def test_disabled_ends_with_an_error_inside(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN)
    changed = run(case, model)
    with pytest.raises(RuntimeError, match="inside"), handle.disabled():
        raise RuntimeError("inside")
    assert torch.equal(run(case, model), changed)


def test_detach_undoes_everything(case: Case) -> None:
    model = case.build()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)  # a choice of the user's, to be kept
    before, frozen = snapshot(model), run(case, model)
    handle = zinit.attach(model, OPEN)
    assert not torch.equal(run(case, model), frozen)
    loss_of(case, model).backward()
    handle.detach()
    assert_same(snapshot(model), before)
    assert torch.equal(run(case, model), frozen)
    assert type(model).__name__ in repr(model)
    with pytest.raises(ConfigError, match="no longer attached"):
        handle.detach()
    assert "detached" in repr(handle)


def test_the_model_keeps_its_class_api_and_names(case: Case) -> None:
    model = case.build()
    before = snapshot(model)
    handle = zinit.attach(model, CLOSED)
    now = snapshot(model)
    assert now["class"] is before["class"]
    assert now["config"] == before["config"]
    ours = {f"{site}.zinit.default.{name}" for site, p in handle.prefixes.items() for name, _ in p.named_parameters()}
    assert set(now["state"]) - set(before["state"]) == ours
    for name, tensor in before["state"].items():
        assert torch.equal(now["state"][name], tensor), name


# --- nothing happens where something is wrong ---------------------------------------------------------------------


def failing_install(case: Case, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Any]:
    """An attach whose second installation fails."""
    backbone = BACKBONES.get(case.backbone)
    install, calls = type(backbone).install, []

    def fail(self: Any, model: nn.Module, site: Any, slot: Any) -> None:
        calls.append(site)
        if len(calls) == 2:
            raise BackboneError("this layer is odd")
        install(self, model, site, slot)

    monkeypatch.setattr(type(backbone), "install", fail)
    return lambda model: zinit.attach(model, CLOSED)


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        (lambda model: zinit.attach(model, zinit.PrefixConfig(layers=99)), BackboneError),
        (lambda model: zinit.attach(model, zinit.PrefixConfig(layers=(0, 99))), BackboneError),
        (lambda model: zinit.attach(model, CLOSED, backbone="lama"), ConfigError),
        (lambda model: zinit.attach(model, CLOSED, name="no such name"), ConfigError),
        (lambda model: zinit.attach(model, CLOSED, name="forward"), ConfigError),
        (lambda model: zinit.attach(model, CLOSED, name="keys_values"), ConfigError),
        (lambda model: zinit.attach(model, CLOSED, device="nonsense"), RuntimeError),
    ],
    ids=["too-many", "too-high", "backbone", "name", "taken-by-torch", "taken-by-zinit", "device"],
)
def test_a_failed_attach_touches_nothing(case: Case, attempt: Any, error: type[Exception]) -> None:
    model = case.build()
    before = snapshot(model)
    with pytest.raises(error):
        attempt(model)
    assert_same(snapshot(model), before)
    with pytest.raises(ConfigError):
        zinit.get_handle(model)


def test_a_failed_second_attach_keeps_the_first(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN)
    before, output = snapshot(model), run(case, model)
    for name, config in (("other", zinit.PrefixConfig(layers=99)), ("train", OPEN)):
        with pytest.raises((BackboneError, ConfigError)):
            zinit.attach(model, config, name=name)
        assert_same(snapshot(model), before)
        assert torch.equal(run(case, model), output)
        assert handle.active


def test_a_failing_installation_is_rolled_back(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build()
    before = snapshot(model)
    attempt = failing_install(case, monkeypatch)
    with pytest.raises(BackboneError, match="odd"):
        attempt(model)
    assert_same(snapshot(model), before)


def test_the_same_name_twice_is_refused(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN)
    before, output = snapshot(model), run(case, model)
    with pytest.raises(ConfigError, match="'default' already"):
        zinit.attach(model, OPEN)
    assert_same(snapshot(model), before)
    assert torch.equal(run(case, model), output)
    assert handle.active


def test_a_part_of_an_adapted_model_is_refused(case: Case) -> None:
    """Attached through the whole model and again through its inner one, a layer would hold two slots."""
    model = case.build()
    inner = next((child for child in model.children() if len(list(child.children())) > 1), None)
    if inner is None or not any(BACKBONES.get(name).matches(inner) for name in BACKBONES):
        pytest.skip("no inner model")
    zinit.attach(model, OPEN)
    before, output = snapshot(model), run(case, model)
    with pytest.raises(ConfigError, match="already"):
        zinit.attach(inner, OPEN, name="other")
    assert_same(snapshot(model), before)
    assert torch.equal(run(case, model), output)


# --- what the models here must be ---------------------------------------------------------------------------------


def test_the_cases_can_tell_right_from_wrong(case: Case) -> None:
    """Same weights at every build, no parameter trivial: else the tests above would compare nothing."""
    one, two = case.build(), case.build()
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() == 0 or a.unique().numel() > 1, name
    assert not torch.equal(next(randomized(one).parameters()), torch.zeros(()))
    assert isinstance(zinit.attach(one, CLOSED).sites[0].module.zinit, PrefixSlot)
