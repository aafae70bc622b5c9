"""What every backbone promises, whatever the model: closed gates change nothing, detaching undoes everything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import CASES, Case, randomized
from zinit.backbones import BACKBONES
from zinit.backbones.base import PrefixSlot
from zinit.errors import BackboneError, ConfigError

CLOSED = zinit.PrefixConfig(length=5, layers=2)
OPEN = zinit.PrefixConfig(length=5, layers=2, gate_init=0.7)
VARIANTS: dict[str, zinit.PrefixConfig] = {
    "tanh": CLOSED,
    "identity": zinit.PrefixConfig(length=5, layers=2, gate="identity"),
    "per-layer": zinit.PrefixConfig(length=5, gate_per="layer"),
    "key-value": zinit.PrefixConfig(length=5, layers=2, parametrization="key_value"),
}
WITHOUT_GATE: dict[str, zinit.PrefixConfig] = {
    "ungated": zinit.PrefixConfig(length=5, layers=2, gating=False),
    "joint": zinit.PrefixConfig(length=5, layers=2, gating=False, separate_softmax=False),
}


def set_implementation(model: Any, name: str | None) -> None:
    if name is not None:
        model.set_attn_implementation(name)


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
    for variant in ({}, {"gating": False, "separate_softmax": False}):
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
    handle = zinit.attach(model, CLOSED)
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


# --- learning -----------------------------------------------------------------------------------------------------


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


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compiles_without_a_graph_break(leader: Case, implementation: str) -> None:
    if leader.implementations and implementation not in leader.implementations:
        pytest.skip(f"no {implementation}")
    torch.compiler.reset()
    model = leader.build().train()
    set_implementation(model, implementation if leader.implementations else None)
    handle = zinit.attach(model, OPEN, seed=0)
    loss_of(leader, model).backward()
    eager = gradients(handle)
    model.zero_grad()
    backend = "aot_eager" if implementation == "sdpa" else "eager"  # once through autograd's graph is enough
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    loss_of(leader, compiled).backward()
    for name, grad in gradients(handle).items():
        torch.testing.assert_close(grad, eager[name], atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


def test_a_compiled_model_notices_what_happens_to_the_adapter(leader: Case) -> None:
    """Attached after compiling, disabled, and detached: the graph is remade, never stale."""
    torch.compiler.reset()
    model = leader.build()
    compiled: Any = torch.compile(model, backend="eager")
    frozen = run(leader, compiled)
    handle = zinit.attach(compiled, OPEN)
    assert zinit.get_handle(compiled) is handle
    changed = run(leader, compiled)
    torch.testing.assert_close(changed, run(leader, model), atol=1e-5, rtol=1e-5)
    assert (changed - frozen).abs().max() > 1e-2
    with handle.disabled():
        torch.testing.assert_close(run(leader, compiled), frozen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(leader, compiled), changed, atol=1e-5, rtol=1e-5)
    handle.detach()
    torch.testing.assert_close(run(leader, compiled), frozen, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


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


# --- what the models here must be ---------------------------------------------------------------------------------


def test_the_cases_can_tell_right_from_wrong(case: Case) -> None:
    """Same weights at every build, no parameter trivial: else the tests above would compare nothing."""
    one, two = case.build(), case.build()
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() == 0 or a.unique().numel() > 1, name
    assert not torch.equal(next(randomized(one).parameters()), torch.zeros(()))
    assert isinstance(zinit.attach(one, CLOSED).sites[0].module.zinit, PrefixSlot)
