"""Adapters that tune the host side by side in one batch: each row is what it is alone, and so are all gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.adapter.test_bias_tuning import randomize
from tests.contract.cases import Case, causal_lm
from tests.contract.checks import run
from tests.contract.test_generation import MODES, generate, nothing_is_kept
from tests.contract.test_routing import difference, one_by_one, only
from zinit.adapter.bias_by_sample import takes_weights_by_sample
from zinit.adapter.bias_tuning import BiasTuning
from zinit.errors import ConfigError

PREFIX = zinit.PrefixConfig(length=4, layers=2, gate_init=0.7)
PAPER = zinit.TuningConfig()
ADAPTERS: dict[str, zinit.PrefixConfig | zinit.AdapterConfig] = {
    "paper": zinit.AdapterConfig(parts={"prefix": PREFIX}, tuning=PAPER),
    "input": zinit.AdapterConfig(
        parts={"prefix": replace(PREFIX, length=2)}, tuning=zinit.TuningConfig(scale="input", norms=False, lora_rank=3)
    ),
    "lora": zinit.AdapterConfig(parts={}, tuning=zinit.TuningConfig(scale="none", norms="blocks", lora_rank=2)),
    "plain": replace(PREFIX, parametrization="key_value"),
}
ROUTE: list[str | None] = ["paper", "lora", None]
ROUTES: list[list[str | None]] = [ROUTE, ["plain", "input", "paper"], ["input", None, "input"]]


def tuned(model: nn.Module) -> Any:
    """A model with all the adapters, every learned number of them its own."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        handle = zinit.attach(model, config, name=name, seed=seed)
        if handle.tuning is not None:
            randomize(handle, seed)
    return model


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_each_row_is_what_it_is_alone(leader: Case, route: list[str | None]) -> None:
    model = tuned(leader.build())
    expected = one_by_one(leader, model, route)
    with zinit.get_handle(model, "plain").route(route):
        together = run(leader, model)
    assert difference(together, expected) <= 1e-6
    for row, name in enumerate(route):
        others = [one_by_one(leader, model, [other] * 3)[row] for other in (*ADAPTERS, None) if other != name]
        assert all(difference(together[row], other) > 1e-3 for other in others)
        if name is None:
            assert torch.equal(together[row], expected[row])
    assert nothing_is_kept(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_without_an_adapter_is_the_base_bit_for_bit(leader: Case, dtype: torch.dtype) -> None:
    model = tuned(leader.build().to(dtype))
    handle = zinit.get_handle(model, "paper")
    with handle.disabled():
        base = run(leader, model)
    with handle.route([None, "paper", "input"]):
        mixed = run(leader, model)
    assert torch.equal(mixed[0], base[0])
    assert all(difference(mixed[row], base[row]) > 1e-3 for row in (1, 2))


def gradients(case: Case, model: nn.Module, rows: list[int]) -> dict[str, Tensor]:
    """Of every adapter's parameters, for a loss that weights each row in its own way."""
    for parameter in model.parameters():
        parameter.grad = None
    output = case.output(model, case.batch("left"))
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights)[rows].sum().backward()
    own = {name: zinit.get_handle(model, name) for name in ADAPTERS}
    return {
        f"{name}.{key}": parameter.grad.clone()
        for name, handle in own.items()
        for key, parameter in handle.named_parameters()
        if parameter.grad is not None
    }


def test_gradients_are_the_sum_of_each_rows_own(leader: Case) -> None:
    model = tuned(leader.build())
    expected: dict[str, Tensor] = {}
    for row, name in enumerate(ROUTE):
        with only(model, name):
            want_gradients(model)
            for key, gradient in gradients(leader, model, [row]).items() if name else ():
                expected[key] = expected.get(key, torch.zeros(())) + gradient
    with zinit.get_handle(model, "plain").route(ROUTE):
        found = gradients(leader, model, [0, 1, 2])
    assert {key.partition(".")[0] for key in expected} == {"paper", "lora"}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6 * largest, msg=key)
    assert all(not found[key].any() for key in found.keys() - expected.keys())


def want_gradients(model: nn.Module) -> None:
    """Activating one adapter freezes the others."""
    for name in ADAPTERS:
        for parameter in zinit.get_handle(model, name).parameters():
            parameter.requires_grad_(True)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_each_row_is_continued_by_its_own_adapter(mode: str) -> None:
    case = Case(name="llama", backbone="llama", build=lambda: causal_lm("Llama"))
    model = tuned(case.build())
    with zinit.get_handle(model, "plain").route(ROUTE):
        ids, scores = generate(case, model, **MODES[mode])
    beams = scores.shape[1] // 3
    for row, name in enumerate(ROUTE):
        with only(model, name):
            alone, alone_scores = generate(case, model, **MODES[mode])
        assert torch.equal(ids[row], alone[row])
        rows = slice(row * beams, (row + 1) * beams)
        assert difference(scores[:, rows], alone_scores[:, rows]) <= 1e-5
        if name is None:
            assert torch.equal(scores[:, rows], alone_scores[:, rows])


def test_values_loaded_inside_are_noticed(leader: Case) -> None:
    model = tuned(leader.build())
    lora = zinit.get_handle(model, "lora")
    with lora.route(ROUTE):
        before = run(leader, model)
        lora.load_state_dict({name: -tensor for name, tensor in lora.state_dict().items()})
        after = run(leader, model)
    assert difference(after[1], before[1]) > 1e-3
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert difference(after, one_by_one(leader, model, ROUTE)) <= 1e-6


INNER: list[list[str | None]] = [["paper", None, "input"], ["input", "lora", None], ["lora", "plain", "paper"]]


def test_routes_in_one_scope_stack_no_tuning_twice(leader: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second brings an adapter in, the third has none that is new; values loaded in between are noticed."""
    model, stacked = tuned(leader.build()), BiasTuning.stacked
    handle = zinit.get_handle(model, "input")
    expected = [one_by_one(leader, model, route) for route in INNER]
    made: list[tuple[str, ...]] = []

    def noted(on: Any, name: str, module: nn.Module) -> Any:
        made.append(tuple(on))
        return stacked(on, name, module)

    monkeypatch.setattr(BiasTuning, "stacked", noted)
    with torch.no_grad(), handle.disabled(), handle.cached_kv():
        for number, (route, right) in enumerate(zip(INNER, expected, strict=True)):
            made.clear()
            with handle.route(route):
                assert difference(run(leader, model), right) <= 1e-6
            assert bool(made) == (number < 2)
            assert number != 1 or ("paper", "input", "lora") in made
        with handle.route(INNER[0]):
            handle.load_state_dict({name: -tensor for name, tensor in handle.state_dict().items()})
            after = run(leader, model)
    assert difference(after[2], expected[0][2]) > 1e-3
    assert difference(after, one_by_one(leader, model, INNER[0])) <= 1e-6
    assert nothing_is_kept(model)


def test_a_route_multiplies_by_the_lora_of_its_own_adapters_alone(leader: Case) -> None:
    """Whichever adapters other routes in the same scope have named: a server has seen many."""
    model = tuned(leader.build())
    handle = zinit.get_handle(model, "plain")
    with torch.no_grad(), handle.disabled(), handle.cached_kv():
        for route, ranks in ((["input", "lora", None], 5), (["lora", None, "plain"], 2), (["paper", None, "plain"], 0)):
            with handle.route(route):
                scope = handle.state.scope()
                assert scope.route is not None
                found = [one for each in scope.route.tuned.values() for one in each if hasattr(one, "down")]
                assert {0 if one.down is None else len(one.down) for one in found} == {ranks}


def test_a_route_of_one_is_for_every_row(leader: Case) -> None:
    model = tuned(leader.build())
    with zinit.get_handle(model, "plain").route(["lora"]):
        together = run(leader, model)
    assert difference(together, one_by_one(leader, model, ["lora"] * 3)) <= 1e-6


def test_norms_that_take_weights_by_sample() -> None:
    """LLaMA's multiply by what they are given, torch's want a vector: their adapters go one after the other."""
    llama, neox = causal_lm("Llama"), causal_lm("GPTNeoX")
    assert takes_weights_by_sample(llama.get_submodule("model.norm"))
    assert not takes_weights_by_sample(neox.get_submodule("gpt_neox.final_layer_norm"))


def test_words_without_their_samples_are_refused() -> None:
    """The expert that all words of Qwen2-MoE share gets them in one long row."""
    sizes = {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model: Any = causal_lm("Qwen2Moe", num_experts_per_tok=1, decoder_sparse_step=1, mlp_only_layers=[0, 1], **sizes)
    config = zinit.AdapterConfig(parts={}, tuning=PAPER)
    for name in ("a", "b"):
        randomize(zinit.attach(model, config, name=name))
    case = Case(name="moe", backbone="transformers", build=lambda: model)
    message = r"shared_expert.* takes words without their samples, \(27, 16\).*linears=\[\.\.\.\]"
    with pytest.raises(ConfigError, match=message), zinit.get_handle(model, "a").route(["a", "b", None]):
        run(case, model)
    with zinit.get_handle(model, "a").route(["a"]):
        assert difference(run(case, model), one_by_one(case, model, ["a"] * 3)) <= 1e-6
    with (
        pytest.raises(ConfigError, match="a route of 2 samples does not fit a batch of 3"),
        zinit.get_handle(model, "a").route(["a", None]),
    ):
        run(case, model)


def test_a_tuned_route_compiles() -> None:
    model: Any = causal_lm("Llama", num_hidden_layers=1)
    for name in ("paper", "lora"):
        config = ADAPTERS[name]
        assert isinstance(config, zinit.AdapterConfig)
        randomize(zinit.attach(model, replace(config, parts={}), name=name))
    case, route = Case(name="llama", backbone="llama", build=lambda: model), ["paper", "lora", "paper"]
    expected = one_by_one(case, model, [*route])
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with zinit.get_handle(model, "paper").route(route):
        assert difference(run(case, compiled), expected) <= 1e-5
    torch.compiler.reset()
