"""The adapted model against the formula written out by hand: outputs and the gradient of every adapter parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zinit
from tests.contract.cases import causal_lm, text_batch
from tests.contract.naive import NaiveModel, NaivePrefix, Tensors, naive_logits

TOLERANCE = 1e-5

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads": ("Llama", {"num_key_value_heads": 4}),
    "gqa": ("Llama", {}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "head-dim": ("Llama", {"head_dim": 12}),
    "bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {}),
}
JOINT = {"gating": False, "separate_softmax": False}
PREFIXES: dict[str, dict[str, Any]] = {
    "tanh": {},
    "identity": {"gate": "identity"},
    "per-layer": {"gate_per": "layer"},
    "by-query": {"gate": "query"},
    "ungated": {"gating": False},
    "joint": JOINT,
    "joint-gated": {"separate_softmax": False},
    "joint-identity-per-layer": {"separate_softmax": False, "gate": "identity", "gate_per": "layer"},
    "joint-by-query": {"separate_softmax": False, "gate": "query"},
    "key-value": {"parametrization": "key_value"},
    "key-value-joint": {"parametrization": "key_value", **JOINT},
    "key-value-joint-gated": {"parametrization": "key_value", "separate_softmax": False},
    "matrix": {"parametrization": "matrix", "length": 10},
    "matrix-ungated": {"parametrization": "matrix", "length": 10, "gating": False},
    "matrix-by-query": {"parametrization": "matrix", "length": 10, "gate": "query"},
    "chosen-layers": {"layers": (0, 2)},
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def open_up(handle: zinit.Handle) -> None:
    """Sets every gate to another number: no two heads or layers may be confused."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".gate"):
                parameter.normal_(generator=generator)


def check(
    model: nn.Module,
    config: zinit.PrefixConfig,
    padding: str,
    context: Tensor | None = None,
    implementation: str = "sdpa",
    weights: Tensors | None = None,
) -> None:
    """Compares logits and all adapter gradients of one batch with the oracle's, which uses ``weights`` if given."""
    settings: Any = model.config
    weights = weights or {name: tensor.double() for name, tensor in model.state_dict().items()}
    shape = NaiveModel(
        num_layers=settings.num_hidden_layers,
        num_heads=settings.num_attention_heads,
        num_kv_heads=settings.num_key_value_heads,
        head_dim=getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads,
        norm_eps=settings.rms_norm_eps,
        rope_theta=settings.rope_parameters["rope_theta"],
        sliding_window=getattr(settings, "sliding_window", None),
    )
    model.set_attn_implementation(implementation)  # pyright: ignore[reportCallIssue]
    handle = zinit.attach(model, config, seed=0)
    open_up(handle)
    batch = text_batch(padding)
    words = batch["attention_mask"].bool()
    weight = torch.randn(3, 9, settings.vocab_size, generator=torch.Generator().manual_seed(4))[words]

    got = model(**batch, zinit_context=context).logits[words]
    (got * weight).sum().backward()

    adapter: Tensors = {name: p.detach().double().requires_grad_() for name, p in handle.named_parameters()}
    prefix = NaivePrefix(squash=config.gate, gated=config.gating, joint=not config.separate_softmax)
    deep = None if context is None else context.detach().double().requires_grad_()
    expected = naive_logits(weights, shape, **batch, prefix=prefix, adapter=adapter, context=deep)[words]
    (expected * weight).sum().backward()

    assert relative_error(got.detach(), expected.detach()) <= TOLERANCE
    grads: Tensors = {}
    wants: Tensors = {}
    for name, parameter in handle.named_parameters():
        want = adapter[name].grad
        assert parameter.grad is not None, name
        assert want is not None, name
        assert want.abs().max() > 1e-3, f"{name}: nothing to compare"
        assert relative_error(parameter.grad, want) <= 10 * TOLERANCE, (
            name
        )  # a lone gate may be a small sum of large terms
        grads[name], wants[name] = parameter.grad, want
    for kind in {name.rpartition(".self_attn.")[2] for name in wants}:  # all gates, all prompts, ...
        mine = [name for name in wants if name.endswith(f".self_attn.{kind}")]
        got_all, want_all = (torch.stack([tensors[name] for name in mine]) for tensors in (grads, wants))
        assert relative_error(got_all, want_all) <= TOLERANCE, kind
    if context is not None and context.requires_grad:
        assert context.grad is not None
        assert deep is not None
        assert deep.grad is not None
        assert relative_error(context.grad, deep.grad) <= TOLERANCE


def test_oracle_agrees_with_the_plain_model() -> None:
    """Before it judges anything the oracle reproduces the unadapted model."""
    model = causal_lm("Llama")
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    shape = NaiveModel(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-6, rope_theta=10000.0)
    batch = text_batch("left")
    words = batch["attention_mask"].bool()
    expected = naive_logits(weights, shape, **batch, prefix=NaivePrefix(), adapter={})[words]
    assert relative_error(model(**batch).logits[words].detach(), expected) <= TOLERANCE


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("model", MODELS)
def test_every_shape_of_host(model: str, padding: str) -> None:
    kind, changes = MODELS[model]
    check(causal_lm(kind, **changes), zinit.PrefixConfig(length=5, layers=2), padding)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_variant_of_the_prefix(prefix: str, implementation: str) -> None:
    config = zinit.PrefixConfig.from_dict({"length": 5, "layers": 2} | PREFIXES[prefix])
    model = causal_lm("Llama", head_dim=12, attention_bias=True)
    for padding in ("left", "none"):
        check(model, config, padding, implementation=implementation)
        zinit.get_handle(model).detach()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("prefix", ["tanh", "joint"])
def test_a_context_for_each_sample(prefix: str, rows: int) -> None:
    context = torch.randn(3, rows, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    check(causal_lm("Llama"), zinit.PrefixConfig(length=5, layers=2, **PREFIXES[prefix]), "left", context)


def test_a_prompt_of_one_vector() -> None:
    check(causal_lm("Llama"), zinit.PrefixConfig(length=1, layers=3), "right")
