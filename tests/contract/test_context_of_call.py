"""``model(..., zinit_context=context)``: `Handle.context` for one call, delivered by every host or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zinit
from tests.contract.cases import SMALL_TEXT, SMALL_VISION, Case, causal_lm, encoder, last_hidden, randomized, text_batch
from tests.contract.checks import OPEN, run
from tests.contract.test_generation import nothing_is_kept
from zinit import compat
from zinit.adapter.recompute import BlockCalls
from zinit.errors import ConfigError


def given(case: Case, samples: int = 3) -> Tensor:
    return torch.randn(samples, 1, case.width, generator=torch.Generator().manual_seed(5))


def test_it_is_a_scope_for_one_call(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN, seed=0)
    without, context = run(case, model), given(case)
    with handle.context(context):
        expected = run(case, model)
    assert not torch.allclose(expected, without, atol=1e-3)
    assert torch.equal(run(case, model, zinit_context=context), expected)
    assert torch.equal(run(case, model, zinit_context=None), without)
    with handle.disabled():
        base = run(case, model)
        assert torch.equal(run(case, model, zinit_context=context), base)
    assert torch.equal(run(case, model), without)
    assert nothing_is_kept(model)


def test_it_ends_with_an_error_inside(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN, seed=0)
    without = run(case, model)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("inside")

    hook = handle.sites[-1].module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        run(case, model, zinit_context=given(case))
    hook.remove()
    assert torch.equal(run(case, model), without)


def test_it_must_be_clear_whose_it_is(case: Case) -> None:
    model = case.build()
    zinit.attach(model, OPEN, name="a")
    b = zinit.attach(model, OPEN, name="b")
    with b.route(["a", None, "a"]), pytest.raises(ConfigError, match="a route takes no context"):
        run(case, model, zinit_context=given(case))
    b.activate("a", "b")
    with pytest.raises(ConfigError, match="a, b all take a context"):
        run(case, model, zinit_context=given(case))
    b.detach()
    zinit.get_handle(model, "a").detach()
    zinit.attach(model, zinit.PrefixConfig(length=5, parametrization="key_value"))
    with pytest.raises(ConfigError, match="take no context"):
        run(case, model, zinit_context=given(case))


def siglip(kind: str) -> nn.Module:
    config = getattr(transformers, f"Siglip{kind}Config")(**{"Text": SMALL_TEXT, "Vision": SMALL_VISION}[kind])
    config._attn_implementation = "sdpa"
    return randomized(getattr(transformers, f"Siglip{kind}Model")(config))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "stablelm": lambda: causal_lm("StableLm"),
    "persimmon": lambda: causal_lm("Persimmon"),
    "siglip-text": lambda: siglip("Text"),
    "siglip-vision": lambda: siglip("Vision"),
    "opt": lambda: causal_lm("OPT", word_embed_proj_dim=32, ffn_dim=48),
    "esm": lambda: encoder("Esm", position_embedding_type="rotary"),
}


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_layers_that_hand_nothing_on_get_it_too(name: str) -> None:
    """Many families drop arguments on their way to the attention."""
    model = HOSTS[name]()
    handle = zinit.attach(model, OPEN, seed=0)
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)} if "vision" in name else text_batch("right")
    output = last_hidden if "siglip" in name else lambda model, batch, **kwargs: model(**batch, **kwargs).logits
    without, context = output(model, batch), torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(5))
    with handle.context(context):
        expected = output(model, batch)
    assert not torch.allclose(expected, without, atol=1e-3)
    assert torch.equal(output(model, batch, zinit_context=context), expected)
    assert torch.equal(output(model, batch), without)


@torch.no_grad()
def test_a_compiled_model_takes_it_or_says_why_not() -> None:
    """Also one whose layers hand no arguments on."""
    torch.compiler.reset()
    model = causal_lm("StableLm", num_hidden_layers=1)
    handle = zinit.attach(model, zinit.PrefixConfig(length=5, gate_init=0.7), seed=0)
    batch, context = text_batch("right"), torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(5))
    with handle.context(context):
        expected = model(**batch).logits
    assert not torch.allclose(expected, model(**batch).logits, atol=1e-3)
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch, zinit_context=context).logits, expected, atol=1e-5, rtol=1e-5)
    assert nothing_is_kept(model)
    torch.compiler.reset()
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"with fullgraph=True, write 'with handle\.context\(context\):'"):
        whole(**batch, zinit_context=context)
    assert nothing_is_kept(model)
    torch.compiler.reset()


@torch.no_grad()
def test_a_layer_that_is_called_by_itself_takes_it_too() -> None:
    """Also where keys and values without a context were computed ahead."""
    model: Any = causal_lm("Llama")
    handle = zinit.attach(model, OPEN, seed=0)
    generator = torch.Generator().manual_seed(5)
    states, context = torch.randn(3, 6, 32, generator=generator), torch.randn(3, 1, 32, generator=generator)
    turns = model.model.rotary_emb(states, torch.arange(6)[None])

    def call(**given: Any) -> Tensor:
        return model.model.layers[2].self_attn(states, position_embeddings=turns, attention_mask=None, **given)[0]

    without = call()
    with handle.context(context):
        expected = call()
    assert not torch.allclose(expected, without, atol=1e-3)
    with handle.cached_kv():
        assert torch.equal(call(zinit_context=context), expected)
        assert torch.equal(call(), without)


def test_an_inner_model_takes_it_as_well() -> None:
    """As `get_image_features` of SigLIP and CLIP calls its tower."""
    model: Any = causal_lm("StableLm")
    handle = zinit.attach(model, OPEN, seed=0)
    batch, context = text_batch("right"), torch.randn(3, 1, 32)
    with handle.context(context), torch.no_grad():
        expected = model.model(**batch).last_hidden_state
    with torch.no_grad():
        assert torch.equal(model.model(**batch, zinit_context=context).last_hidden_state, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_that_ended_before_the_backward_pass_is_noticed(case: Case, reentrant: bool) -> None:
    """The whole model is computed again: its blocks get inputs that nobody has seen before."""
    model = case.build().train()
    handle = zinit.attach(model, OPEN, seed=0)
    start = torch.zeros(1, requires_grad=True)

    def whole(start: Tensor) -> Tensor:
        return case.output(model, case.batch("none")) + start

    with handle.context(given(case)):
        output = checkpoint(whole, start, use_reentrant=reentrant)
    with pytest.raises(ConfigError, match="computed again in the backward pass"):
        output.square().sum().backward()  # pyright: ignore
    model = case.build().train()
    handle = zinit.attach(model, OPEN, seed=0)
    output = checkpoint(whole, start, use_reentrant=reentrant)
    output.square().sum().backward()  # pyright: ignore
    assert all(parameter.grad is not None for parameter in handle.parameters())


class Gone:
    """A reference to memory that is in use for something else by now."""

    def expired(self) -> bool:
        return True


def test_an_address_that_is_used_again_is_no_call_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = causal_lm("Llama").train()
    handle = zinit.attach(model, OPEN, seed=0)
    calls, block, states = BlockCalls(handle.state), model.model.layers[2], torch.randn(1, 4, 32)
    with handle.context(torch.randn(1, 1, 32)):
        calls.before(block, (states,), {})
    calls.seen = {call: (Gone(), scope) for call, (_, scope) in calls.seen.items()}
    assert len(calls.seen) == 1
    monkeypatch.setattr(compat, "is_in_backward", lambda: True)
    with pytest.raises(ConfigError, match="computed again in the backward pass"):
        calls.before(block, (states,), {})
