"""A route gives each sample its own adapter: the same as calling the model once for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import Case
from tests.contract.checks import gradients, loss_of, run, set_implementation
from tests.contract.test_generation import MODES, counted_projections, generate, nothing_is_kept
from zinit.errors import ConfigError

CONFIGS = {
    "plain": zinit.PrefixConfig(length=5, layers=2, gate_init=0.7),
    "short": zinit.PrefixConfig(length=2, layers=1, gate="identity", gate_per="layer", gate_init=-0.9),
    "ungated": zinit.PrefixConfig(length=3, layers=(0, 2), gating=False),
    "learned": zinit.PrefixConfig(length=7, parametrization="key_value", gate_init="random"),
}
ROUTES: list[list[str | None]] = [
    ["plain", "short", None],
    ["learned", "ungated", "plain"],
    ["short", None, "short"],
    ["learned", "learned", "learned"],
]


@pytest.fixture
def model(case: Case) -> nn.Module:
    return adapted(case)


def adapted(case: Case) -> nn.Module:
    """A tiny model with all the adapters; the one attached last is active."""
    model = case.build()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        zinit.attach(model, config, name=name, seed=seed)
    return model


@contextmanager
def only(model: nn.Module, name: str | None) -> Iterator[None]:
    """One adapter for the whole batch, in the ordinary way."""
    handle = zinit.get_handle(model, name or "plain")
    handle.activate()
    if name is not None:
        yield
    else:
        with handle.disabled():
            yield


def one_by_one(case: Case, model: nn.Module, route: list[str | None], padding: str = "left") -> Tensor:
    """Row i of the output under the adapter of row i."""
    rows: list[Tensor] = []
    for row, name in enumerate(route):
        with only(model, name):
            rows.append(run(case, model, padding)[row])
    return torch.stack(rows)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the size of the numbers."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_each_sample_has_its_own_adapter(case: Case, model: nn.Module, route: list[str | None]) -> None:
    for implementation in case.implementations or (None,):
        set_implementation(model, implementation)
        for padding in case.paddings or ("none",):
            expected = one_by_one(case, model, route, padding)
            with zinit.get_handle(model, "short").route(route):
                together = run(case, model, padding)
            assert difference(together, expected) <= 1e-6
            for row, name in enumerate(route):
                if name is None:
                    assert torch.equal(together[row], expected[row])
    assert nothing_is_kept(model)


def test_the_adapters_differ(case: Case, model: nn.Module) -> None:
    """Else nothing above would tell a right route from a wrong one."""
    names = [*CONFIGS, None]
    outputs = [one_by_one(case, model, [name] * 3) for name in names]
    for i in range(len(names)):
        for j in range(i):
            assert difference(outputs[i], outputs[j]) > 1e-3, (names[i], names[j])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_none_is_the_frozen_model_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    model = adapted(case).to(dtype)
    handle = zinit.get_handle(model, "learned")
    with handle.disabled():
        frozen = run(case, model)
    with handle.route([None] * 3):
        assert torch.equal(run(case, model), frozen)
    with handle.route([None, "learned", None]):
        mixed = run(case, model)
    assert torch.equal(mixed[[0, 2]], frozen[[0, 2]])
    assert difference(mixed[1], frozen[1]) > 1e-3


def test_a_batch_may_be_a_multiple(case: Case, model: nn.Module) -> None:
    """What belongs to one sample lies side by side; a route of one name is for everybody."""
    handle = zinit.get_handle(model, "plain")
    expected = one_by_one(case, model, ["short"] * 3)
    with handle.route(["short"]):
        assert difference(run(case, model), expected) <= 1e-6


def test_the_route_ends_with_its_scope(case: Case, model: nn.Module) -> None:
    """Errors inside, inner routes and `disabled` included; the active adapter is as before."""
    handle = zinit.get_handle(model, "plain")
    handle.activate()
    expected = {name: one_by_one(case, model, [name] * 3) for name in ("plain", "short", None)}
    handle.activate()
    with pytest.raises(ZeroDivisionError), handle.route(["short", "short", "short"]):
        1 / int(difference(run(case, model), expected["short"]) > 1e-6)
    assert nothing_is_kept(model)
    assert handle.active
    assert torch.equal(run(case, model), expected["plain"])
    with handle.route(["short"]):
        with handle.route([None]):
            assert torch.equal(run(case, model), expected[None])
        assert difference(run(case, model), expected["short"]) <= 1e-6
        with handle.disabled():
            assert torch.equal(run(case, model), expected[None])
            with handle.route(["plain"]):
                assert difference(run(case, model), expected["plain"]) <= 1e-6
            assert torch.equal(run(case, model), expected[None])
            zinit.get_handle(model, "learned").activate()
            with handle.frozen_prefix():
                run(case, model)
        assert difference(run(case, model), expected["short"]) <= 1e-6
        handle.activate()  # for afterwards
        assert difference(run(case, model), expected["short"]) <= 1e-6
    assert torch.equal(run(case, model), expected["plain"])
    with handle.disabled(), handle.route(["short"]):
        assert difference(run(case, model), expected["short"]) <= 1e-6
    assert torch.equal(run(case, model), expected["plain"])
    assert nothing_is_kept(model)


def test_values_loaded_inside_are_noticed(case: Case, model: nn.Module) -> None:
    short = zinit.get_handle(model, "short")
    with short.route(["short", None, "plain"]):
        before = run(case, model)
        short.load_state_dict({name: -2 * tensor for name, tensor in short.state_dict().items()})
        after = run(case, model)
    assert difference(after[0], before[0]) > 1e-3
    assert torch.equal(after[1:], before[1:])
    assert difference(after, one_by_one(case, model, ["short", None, "plain"])) <= 1e-6


def test_prompts_are_projected_once_for_all(case: Case, model: nn.Module) -> None:
    with counted_projections(model) as counts:
        with zinit.get_handle(model, "plain").route(["plain", "short", "learned"]):
            assert max(counts.values()) == 1
            before = dict(counts)
            for _ in range(3):
                run(case, model)
        assert counts == before


INNER: list[list[str | None]] = [
    ["plain", None, "short"],
    ["ungated", "learned", "short"],
    ["plain", "ungated", "learned"],
]


def test_routes_in_one_scope_compute_no_adapter_twice(case: Case, model: nn.Module) -> None:
    """The second brings an adapter in, the third has none that is new; values loaded in between are noticed."""
    handle = zinit.get_handle(model, "short")
    expected = [one_by_one(case, model, route) for route in INNER]
    with torch.no_grad(), counted_projections(model) as counts, handle.disabled(), handle.cached_kv():
        projected: list[dict[str, int]] = []
        for route, right in zip(INNER, expected, strict=True):
            with handle.route(route):
                assert difference(run(case, model), right) <= 1e-6
            projected.append(dict(counts))
        first, second, third = projected
        new = zinit.get_handle(model, "ungated").parts["prefix"].prefixes
        assert second == {site: first[site] + (site in new) for site in first}
        assert third == second
        with handle.route(INNER[0]):
            handle.load_state_dict({name: -2 * tensor for name, tensor in handle.state_dict().items()})
            after = run(case, model)
    assert difference(after[2], expected[0][2]) > 1e-3
    assert difference(after, one_by_one(case, model, INNER[0])) <= 1e-6
    assert nothing_is_kept(model)


def test_a_route_under_autocast_leaves_nothing_to_one_without(case: Case, model: nn.Module) -> None:
    handle = zinit.get_handle(model, "short")
    with torch.no_grad(), handle.route(INNER[0]):
        expected = run(case, model)
    with torch.no_grad(), handle.disabled(), handle.cached_kv():
        with torch.autocast("cpu", torch.bfloat16), handle.route(INNER[0]):
            run(case, model)
        with handle.route(INNER[0]):
            assert torch.equal(run(case, model), expected)


def test_a_step_between_two_routes_is_noticed(case: Case, model: nn.Module) -> None:
    """Nothing outlives the scope that it was computed in, and what is kept there has no part in gradients."""
    handle = zinit.get_handle(model, "short")
    with torch.no_grad(), handle.route(INNER[0]):
        before = run(case, model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(-2)
    with torch.no_grad(), handle.route(INNER[0]):
        after = run(case, model)
        assert difference(after[2], before[2]) > 1e-3
        for parameter in handle.parameters():
            parameter.mul_(-0.5)
        with handle.route(INNER[0]):
            assert torch.equal(run(case, model), before), "what a route computes it computes where it is opened"
    handle.activate()
    with handle.route(INNER[0]):
        loss_of(case, model).backward()
    expected = gradients(handle)
    for parameter in handle.parameters():
        parameter.grad = None
    with handle.cached_kv(), handle.route(INNER[2]), handle.route(INNER[0]):
        loss_of(case, model).backward()
    for name, gradient in gradients(handle).items():
        assert gradient.any()
        assert torch.equal(gradient, expected[name])


def test_wrong_routes_are_refused(case: Case, model: nn.Module) -> None:
    handle = zinit.get_handle(model, "plain")
    before = run(case, model)
    joint = zinit.attach(model, zinit.PrefixConfig(length=2, gating=False, separate_softmax=False), name="joint")
    zinit.get_handle(model, "learned").activate()
    for route, message in (
        (["plain", "shrt", None], "'shrt'.*Did you mean 'short'"),
        ([3], "no adapter named 3"),
        ([], "a route is a list"),
        ("plain", "a route is a list"),
        (["plain", "joint"], "separate_softmax=False"),
    ):
        with pytest.raises(ConfigError, match=message), handle.route(route):  # pyright: ignore[reportArgumentType]
            pass
    with (
        pytest.raises(ConfigError, match="a route of 2 samples does not fit a batch of 3"),
        handle.route(["plain", None]),
    ):
        run(case, model)
    joint.detach()
    for what in (
        lambda: zinit.attach(model, name="new"),
        handle.detach,
    ):
        with pytest.raises(ConfigError, match=r"inside handle.route"), handle.route(["short"]):
            what()
    handle.detach()
    with pytest.raises(ConfigError, match="no longer attached"), handle.route(["short"]):
        pass
    with (
        pytest.raises(ConfigError, match="no adapter named 'plain'"),
        zinit.get_handle(model, "short").route(["plain"]),
    ):
        pass
    assert nothing_is_kept(model)
    assert torch.equal(run(case, model), before)


def test_gradients_are_each_rows_own(case: Case, model: nn.Module) -> None:
    """The active adapter learns from its own rows, as it would from them alone."""
    plain = zinit.get_handle(model, "plain")
    found: list[dict[str, Tensor]] = []
    for route in (["plain"] * 3, ["plain", "short", None]):
        plain.activate()
        with plain.route(route):
            output = case.output(model, case.batch("none"))
        model.zero_grad()
        output[0].square().mean().backward()
        assert output.requires_grad
        found.append({name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None})
    assert found[0].keys() == dict(plain.named_parameters()).keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_context_is_refused(case: Case, model: nn.Module) -> None:
    handle = zinit.get_handle(model, "plain")
    before = run(case, model)
    context = torch.zeros(3, 1, next(iter(handle.prefixes.values())).width)
    with pytest.raises(ConfigError, match="takes no context"), handle.context(context), handle.route(["plain"]):
        pass
    with pytest.raises(ConfigError, match="takes no context"), handle.route(["plain"]), handle.context(context):
        run(case, model)
    assert torch.equal(run(case, model), before)


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "static", "uncached", "beams"])
def test_each_sample_is_continued_by_its_own_adapter(generator: Case, mode: str) -> None:
    model: Any = adapted(generator)
    route: list[str | None] = ["learned", None, "short"]
    for padding in generator.paddings:
        with zinit.get_handle(model, "plain").route(route), counted_projections(model) as counts:
            ids, scores = generate(generator, model, padding, **MODES[mode])
            assert not any(counts.values())
        per_sample = scores.shape[1] // 3
        for row, name in enumerate(route):
            with only(model, name):
                alone, alone_scores = generate(generator, model, padding, **MODES[mode])
            assert torch.equal(ids[row], alone[row]), (padding, name)
            rows = slice(row * per_sample, (row + 1) * per_sample)
            assert difference(scores[:, rows], alone_scores[:, rows]) <= 1e-5
            if name is None:
                assert torch.equal(scores[:, rows], alone_scores[:, rows])
    assert nothing_is_kept(model)


@pytest.mark.slow
def test_a_route_under_compile(leader: Case) -> None:
    model = adapted(leader)
    expected = one_by_one(leader, model, ["short", None, "learned"])
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    before = run(leader, compiled)
    with zinit.get_handle(model, "plain").route(["short", None, "learned"]):
        assert difference(run(leader, compiled), expected) <= 1e-5
    assert torch.equal(run(leader, compiled), before)
