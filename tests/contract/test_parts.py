"""Adapters of several parts, shared prompt networks, several adapters at once: the formula, on every backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zinit
from tests.contract.cases import Case, causal_lm, text_batch
from tests.contract.checks import assert_same, run, snapshot
from tests.contract.naive import Addition, NaiveModel, NaivePrefix, Tensors, naive_logits
from tests.contract.test_oracle import TOLERANCE, open_up, relative_error
from zinit.errors import ConfigError

EARLY = zinit.PrefixConfig(length=4, layers=(0,), prompt="context", gate_init=0.6)
LATE = zinit.PrefixConfig(length=10, layers=2, gate_init=0.8)
TWO = zinit.AdapterConfig(parts={"early": EARLY, "late": LATE})
HYPER = zinit.PrefixConfig(length=3, layers=3, prompts="hyper")
SHAPE = NaiveModel(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-6, rope_theta=10000.0)


def tokens(width: int, length: int = 4, batch: int = 3) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(7))


def sites(model: Any) -> list[str]:
    return [f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)]


def oracle(model: Any, batch: Mapping[str, Tensor], more: list[list[Addition]]) -> Tensor:
    weights = {name: tensor.double() for name, tensor in model.state_dict().items() if "zinit" not in name}
    return naive_logits(weights, SHAPE, **batch, prefix=NaivePrefix(), adapter={}, more=more)


def compare(model: Any, got: Tensor, expected: Tensor, ours: Mapping[str, Tensor], theirs: Tensors) -> None:
    """Outputs, and the gradient of each named tensor after the same weighted sum."""
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(got.detach(), expected.detach()) <= TOLERANCE
    for name, parameter in ours.items():
        want = theirs[name].grad
        assert parameter.grad is not None, name
        assert want is not None, name
        assert want.abs().max() > 1e-4, f"{name}: nothing to compare"
        assert relative_error(parameter.grad, want) <= 10 * TOLERANCE, name


# --- (a) layers that share one network ----------------------------------------------------------------------------


def hyper_tables(deep: Tensors, length: int, layers: int) -> list[Tensor]:
    """The prompts that the network makes, written out."""
    found = []
    for layer in range(layers):
        hidden = deep["shared.hyper.embedding"][layer]
        hidden = deep["shared.hyper.hidden.weight"] @ hidden + deep["shared.hyper.hidden.bias"]
        made = deep["shared.hyper.out.weight"] @ hidden.clamp_min(0) + deep["shared.hyper.out.bias"]
        found.append(made.view(length, -1))
    return found


def test_three_layers_share_one_network() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, HYPER, seed=0)
    assert handle.num_trainable == 3 * 64 + 64 * 64 + 64 + 64 * 3 * 32 + 3 * 32 + 3 * 4
    names = [name for name, _ in handle.named_parameters()]
    assert len(names) == len(set(names)) == 5 + 3
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        *(f"{site}.zinit.default.gate" for site in sites(model)),
        *(
            f"zinit.default.hyper.{name}"
            for name in ("embedding", "hidden.weight", "hidden.bias", "out.weight", "out.bias")
        ),
    ]
    open_up(handle)
    with torch.no_grad():  # near zero at the start: nothing could be told apart
        handle.shared["hyper"].out.weight.mul_(1e4)  # pyright: ignore
    batch = text_batch("left")
    words = batch["attention_mask"].bool()
    deep = {name: p.detach().double().requires_grad_() for name, p in handle.named_parameters()}
    tables = dict(zip(sites(model), hyper_tables(deep, 3, 3), strict=True))
    gates = {site: deep[f"{site}.gate"] for site in sites(model)}
    expected = oracle(model, batch, [[Addition(tables, gates)]] * 3)[words]
    compare(model, model(**batch).logits[words], expected, dict(handle.named_parameters()), deep)


def test_the_network_starts_near_zero() -> None:
    """Standard deviation of the prompts: 6.2e-6 at C = 4096, K = 10; it scales with 1/sqrt(C)."""
    from zinit.adapter.sources import HyperPrompts

    made = HyperPrompts(layers=32, length=10, width=1024, generator=torch.Generator().manual_seed(0))
    assert made(5).std().item() == pytest.approx(2 * 6.2e-6, rel=0.3)
    full = HyperPrompts(layers=32, length=10, width=4096)
    assert sum(p.numel() for p in full.parameters()) == 2_668_608


def test_shared_by_every_backbone_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    model = case.build()
    before, base = snapshot(model), run(case, model)
    config = zinit.PrefixConfig(length=3, layers=2, prompts="hyper", gate_init=0.9)
    if len({site.width for site in zinit.attach(model, replace(config, prompts="table"), name="probe").sites}) > 1:
        zinit.get_handle(model, "probe").detach()
        with pytest.raises(ConfigError, match="of one width"):
            zinit.attach(model, config)
        return
    zinit.get_handle(model, "probe").detach()
    handle = zinit.attach(model, config, seed=0)
    with torch.no_grad():
        handle.shared["hyper"].out.weight.mul_(1e5)  # pyright: ignore
    output = run(case, model)
    assert not torch.equal(output, base)
    handle.save(tmp_path)
    fresh = case.build()
    loaded = zinit.load(fresh, tmp_path)
    assert loaded.config == config
    assert torch.equal(run(case, fresh), output)
    handle.detach()
    assert_same(snapshot(model), before)


# --- (b) an early part whose prompts come with the call, and a late one with a table ------------------------------


def additions(handle: zinit.Handle, deep: Tensors, given: Tensor | None, rows: int = 3) -> list[list[Addition]]:
    """What `TWO` adds for each sample."""
    early = {"model.layers.0.self_attn": deep["early.model.layers.0.self_attn.gate"]}
    names = [f"model.layers.{i}.self_attn" for i in (1, 2)]
    late = Addition(
        {name: deep[f"late.{name}.prompt.weight"] for name in names},
        {name: deep[f"late.{name}.gate"] for name in names},
    )
    return [
        [late] if given is None else [Addition({"model.layers.0.self_attn": given[row]}, early), late]
        for row in range(rows)
    ]


def test_early_and_late_against_the_oracle() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, TWO, seed=0)
    assert handle.num_trainable == 4 + 2 * (10 * 32 + 4)
    open_up(handle)
    batch = text_batch("left")
    words = batch["attention_mask"].bool()
    given = tokens(32).requires_grad_()
    deep = {name: p.detach().double().requires_grad_() for name, p in handle.named_parameters()}
    deep_given = given.detach().double().requires_grad_()
    with handle.context(given):
        got = model(**batch).logits[words]
    expected = oracle(model, batch, additions(handle, deep, deep_given))[words]
    compare(model, got, expected, dict(handle.named_parameters()) | {"given": given}, deep | {"given": deep_given})
    late_only = oracle(model, batch, additions(handle, deep, None))[words].detach()
    assert relative_error(model(**batch).logits[words].detach(), late_only) <= TOLERANCE
    by_call = model(**batch, zinit_context=given).logits[words]
    assert torch.equal(by_call, got)


def test_absent_samples_get_exactly_nothing(case: Case) -> None:
    """`present`: their output is that of the same adapter without a context, bit for bit."""
    model = case.build()
    for prompt, length in (("context", 4), ("table+context", 5)):
        part = zinit.PrefixConfig(length=length, layers=2, prompt=prompt, gate_init=0.7)  # pyright: ignore
        handle = zinit.attach(model, zinit.AdapterConfig(parts={"seen": part}), seed=0)
        without = run(case, model, "none")
        given = tokens(case.width, length)
        with handle.context(given):
            everywhere = run(case, model, "none")
        present = torch.tensor([True, False, True])
        with handle.context(zinit.Context(given.index_fill(0, torch.tensor([1]), torch.nan), present)):
            some = run(case, model, "none")
        assert torch.equal(some[1], without[1])
        assert not torch.equal(some[0], without[0])
        torch.testing.assert_close(some[[0, 2]], everywhere[[0, 2]])
        handle.detach()


def test_parts_on_every_backbone(case: Case, tmp_path: Path) -> None:
    """Closed: the base model bit for bit. Open: off, routed, saved, loaded and detached as one adapter."""
    model = case.build()
    before, base = snapshot(model), run(case, model)
    parts = {"low": zinit.PrefixConfig(length=4, layers=1), "high": zinit.PrefixConfig(length=7, layers=2)}
    closed = zinit.attach(model, zinit.AdapterConfig(parts=parts), name="closed")
    assert torch.equal(run(case, model), base)
    closed.detach()
    handle = zinit.attach(model, zinit.AdapterConfig(parts=parts), seed=0)
    assert [name.split(".")[0] for name in handle.prefixes] == ["low"] * len(handle.parts["low"].prefixes) + [
        "high"
    ] * len(handle.parts["high"].prefixes)
    open_up(handle)
    output = run(case, model)
    with handle.disabled():
        assert torch.equal(run(case, model), base)
    with handle.route(["default", None, "default"]):
        routed = run(case, model)
    assert torch.equal(routed[1], base[1])
    torch.testing.assert_close(routed[[0, 2]], output[[0, 2]], atol=1e-5, rtol=1e-5)
    handle.save(tmp_path)
    fresh = case.build()
    assert list(zinit.load(fresh, tmp_path).parts) == ["low", "high"]
    assert torch.equal(run(case, fresh), output)
    handle.detach()
    assert_same(snapshot(model), before)


# --- several adapters at once -------------------------------------------------------------------------------------


def test_adapters_that_are_on_together_sum() -> None:
    model = causal_lm("Llama")
    chat = zinit.attach(model, zinit.PrefixConfig(length=5, layers=2), name="chat", seed=0)
    tone = zinit.attach(model, zinit.PrefixConfig(length=3, layers=3), name="tone", seed=1)
    for handle in (chat, tone):
        open_up(handle)
    chat.activate("chat", "tone")
    assert (chat.active, tone.active) == (True, True)
    assert all(p.requires_grad for p in chat.parameters())
    assert not any(p.requires_grad for p in tone.parameters())
    batch = text_batch("left")
    words = batch["attention_mask"].bool()
    deep = {
        handle.name: {n: p.detach().double().requires_grad_() for n, p in handle.named_parameters()}
        for handle in (chat, tone)
    }
    more = [
        Addition(
            {site: own[f"{site}.prompt.weight"] for site in sites(model) if f"{site}.gate" in own},
            {site: own[f"{site}.gate"] for site in sites(model) if f"{site}.gate" in own},
        )
        for own in deep.values()
    ]
    compare(
        model,
        model(**batch).logits[words],
        oracle(model, batch, [more] * 3)[words],
        dict(chat.named_parameters()),
        deep["chat"],
    )
    with chat.disabled():
        assert not any(handle.active for handle in (chat, tone))
    tone.activate()
    assert (chat.active, tone.active) == (False, True)


def test_what_cannot_be_on_together_is_refused() -> None:
    model = causal_lm("Llama")
    chat = zinit.attach(model, zinit.PrefixConfig(length=5, layers=2), name="chat")
    zinit.attach(model, zinit.PrefixConfig(length=3, gating=False, separate_softmax=False), name="joint")
    with pytest.raises(ConfigError, match="'joint' shares the words' softmax"):
        chat.activate("chat", "joint")
    with pytest.raises(ConfigError, match=r"no adapter named 'chta'.*Did you mean 'chat'"):
        chat.activate("chat", "chta")
    with pytest.raises(ConfigError, match="'chat' among them"):
        chat.activate("joint")
    with pytest.raises(ConfigError, match="'a' shares the words' softmax"):
        zinit.AdapterConfig(
            parts={"a": zinit.PrefixConfig(gating=False, separate_softmax=False), "b": zinit.PrefixConfig()}
        )
    with pytest.raises(ConfigError, match="share one network: give them one length, not"):
        zinit.attach(
            model,
            zinit.AdapterConfig(parts={"a": HYPER, "b": zinit.PrefixConfig(length=4, prompts="hyper")}),
            name="new",
        )
    assert [name for name, _ in model.named_modules() if name.endswith("new")] == []


def test_groups_and_roles() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, TWO)
    groups = handle.groups()
    assert [p.shape for p in groups["visual"]] == [torch.Size([4])]
    assert sum(p.numel() for p in groups["language"]) == 2 * (10 * 32 + 4)
    assert {name: len(own) for name, own in handle.roles().items()} == {"gates": 3, "prompts": 2}
    handle.detach()
    with pytest.raises(ConfigError, match="has one group"):
        zinit.attach(model, LATE).groups()
