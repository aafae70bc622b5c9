"""The formula by itself: `ZeroGatedPrefix` and plain prefix tuning's `concat_prefix`, against loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.config import PrefixConfig
from zinit.errors import ConfigError
from zinit.prefix import ZeroGatedPrefix, concat_prefix, for_each_sample

B, T, S, H, G, D, K, C = 2, 3, 7, 6, 2, 5, 4, 11


def prefix(seed: int = 0, **settings: Any) -> ZeroGatedPrefix:
    config = PrefixConfig.from_dict({"length": K} | settings)
    generator = torch.Generator().manual_seed(seed)
    return ZeroGatedPrefix(config, width=C, num_heads=H, num_kv_heads=G, head_dim=D, generator=generator)


def host(dtype: torch.dtype = torch.float32) -> Any:
    """A frozen key and value projection with biases, as a host would hand it over."""
    torch.manual_seed(1)
    key, value = nn.Linear(C, G * D).to(dtype), nn.Linear(C, G * D).to(dtype)

    def project(tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens if tokens.dim() == 3 else tokens[None]
        return tuple(p(tokens).unflatten(-1, (G, D)).transpose(1, 2) for p in (key, value))  # pyright: ignore

    return project


def by_hand(module: ZeroGatedPrefix, query: Tensor, scale: float, context: Tensor | None = None) -> Tensor:
    """The addition, one head and one query at a time."""
    out, length = torch.zeros_like(query), module.config.length
    for b in range(query.shape[0]):
        if module.config.parametrization == "prompt":
            prompts = module.prompt.weight if context is None else module.prompt.weight + context[b]
            keys, values = (x[0] for x in host()(prompts))
        else:
            keys, values = module.key, module.value
        for h in range(H):
            group = h // (H // G)
            gate: Any = 1.0
            if module.config.gating:
                stored = module.gate[h if module.config.gate_per == "head" else 0]
                gate = stored if module.config.gate == "identity" else torch.tanh(stored)
            for t in range(query.shape[2]):
                if module.config.gate == "query":
                    gate = torch.tanh((stored * query[b, h, t]).sum())
                scores = torch.stack([query[b, h, t] @ keys[group, k] * scale for k in range(length)])
                weights = scores.exp() / scores.exp().sum()
                out[b, h, t] = gate * sum(weights[k] * values[group, k] for k in range(length))
    return out


@pytest.mark.parametrize("scale", [D**-0.5, 0.3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "identity"},
        {"gate_per": "layer"},
        {"gate": "query"},
        {"gate": "query", "gate_per": "layer"},
        {"gating": False},
        {"parametrization": "key_value"},
        {"length": 1},
    ],
    ids=str,
)
def test_the_formula(settings: dict[str, Any], scale: float) -> None:
    module = prefix(gate_init="random", **settings)
    query = torch.randn(B, H, T, D)
    added = module(query, *module.keys_values(host(), query.dtype), scale)
    torch.testing.assert_close(added, by_hand(module, query, scale), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, K])
def test_a_context_for_each_sample(rows: int) -> None:
    module = prefix(gate_init="random")
    query, context = torch.randn(B, H, T, D), torch.randn(B, rows, C)
    added = module(query, *module.keys_values(host(), query.dtype, context), 0.4)
    torch.testing.assert_close(added, by_hand(module, query, 0.4, context), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"gate": "identity"}, {"gate": "query"}, {"gate_per": "layer"}, {"parametrization": "key_value"}]
)
def test_a_closed_gate_adds_exactly_zero(settings: dict[str, Any], dtype: torch.dtype) -> None:
    module = prefix(**settings)
    query = 100 * torch.randn(B, H, T, D, dtype=dtype)
    added = module(query, *module.keys_values(host(dtype), dtype), 1.0)
    assert added.dtype == dtype
    assert not added.any()


def test_at_a_closed_gate_only_the_gate_learns() -> None:
    module = prefix()
    query = torch.randn(B, H, T, D)
    module(query, *module.keys_values(host(), query.dtype), 0.4).square().sum().backward()
    module.zero_grad()
    (module(query, *module.keys_values(host(), query.dtype), 0.4) * torch.randn(B, H, T, D)).sum().backward()
    assert module.gate.grad is not None
    assert (module.gate.grad.abs() > 1e-3).all()
    weight: Any = module.prompt.weight
    assert weight.grad is not None
    assert not weight.grad.any()


def test_gates_after_squashing() -> None:
    stored = torch.linspace(-2, 2, H)
    tanh, identity = prefix(), prefix(gate="identity")
    for module in (tanh, identity):
        with torch.no_grad():
            module.gate.copy_(stored)
    torch.testing.assert_close(tanh.gates(), stored.tanh())
    assert torch.equal(identity.gates(), stored)
    shared = prefix(gate_per="layer", gate_init=0.5)
    assert shared.gate.shape == (1,)
    torch.testing.assert_close(shared.gates(), torch.full((H,), 0.5).tanh())
    assert torch.equal(prefix(gating=False).gates(), torch.ones(H))
    assert not hasattr(prefix(gating=False), "gate")


def test_gates_by_query_show_their_mean_over_the_last_forward() -> None:
    module = prefix(gate="query", gate_init="random")
    assert module.gate.shape == (H, D)
    assert module.gates().isnan().all()
    query = torch.randn(B, H, T, D)
    module(query, *module.keys_values(host(), query.dtype), 0.4)
    expected = torch.einsum("bhtd,hd->bht", query, module.gate).tanh().abs().mean((0, 2))
    torch.testing.assert_close(module.gates(), expected.detach())
    assert module.gates().requires_grad is False
    assert "last_gates" not in module.state_dict()
    copied = copy.deepcopy(module)
    assert torch.equal(copied.gates(), module.gates())


def test_how_it_starts() -> None:
    module = prefix()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"gate": (H,), "prompt.weight": (K, C)}
    assert not module.gate.any()
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    pair = prefix(parametrization="key_value")
    assert {name: tuple(p.shape) for name, p in pair.named_parameters()} == {
        "gate": (H,),
        "key": (G, K, D),
        "value": (G, K, D),
    }
    assert not torch.equal(pair.key, pair.value)
    big = ZeroGatedPrefix(
        PrefixConfig(length=100, init_std=0.5, gate_init="random"), width=300, num_heads=300, num_kv_heads=2, head_dim=5
    )
    weight: Any = big.prompt.weight
    assert weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert big.gate.std().item() == pytest.approx(1, rel=0.2)


def test_a_seed_means_the_same_whatever_the_gate() -> None:
    one, two, other = prefix(seed=3), prefix(seed=3, gate_init=0.5), prefix(seed=4)
    assert torch.equal(one.prompt.weight, two.prompt.weight)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(one.prompt.weight, other.prompt.weight)  # pyright: ignore[reportArgumentType]


def test_on_the_meta_device_it_costs_nothing() -> None:
    module = ZeroGatedPrefix(PrefixConfig(), width=C, num_heads=H, num_kv_heads=G, head_dim=D, device="meta")
    assert all(parameter.device.type == "meta" for parameter in module.parameters())


def test_heads_must_divide() -> None:
    with pytest.raises(ConfigError, match="6 query heads cannot share 4 key/value heads"):
        ZeroGatedPrefix(PrefixConfig(), width=C, num_heads=6, num_kv_heads=4, head_dim=D)


def test_it_holds_no_host() -> None:
    """No module cycle: a copy of the prefix copies the prefix, and its state is its parameters."""
    module = prefix()
    assert set(copy.deepcopy(module).state_dict()) == {"gate", "prompt.weight"}
    assert [type(child).__name__ for child in module.modules()] == ["ZeroGatedPrefix", "PromptTable"]


# --- spreading over the batch -------------------------------------------------------------------------------------


def test_beams_of_a_sample_lie_side_by_side() -> None:
    x = torch.arange(2.0).view(2, 1, 1, 1)
    assert for_each_sample(x, torch.zeros(6, 1, 1, 1)).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert for_each_sample(x[:1], torch.zeros(6, 1, 1, 1)).shape[0] == 6
    assert for_each_sample(x, torch.zeros(2, 1, 1, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="for 2 samples does not fit a batch of 3"):
        for_each_sample(x, torch.zeros(3, 1, 1, 1))


# --- one softmax for prompts and words ----------------------------------------------------------------------------


def joint_by_hand(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, prompts: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """``visible`` is (B, T, S); every prompt is seen by every query."""
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            group = h // (query.shape[1] // key.shape[1])
            prompt_key, prompt_value = (x[b if x.shape[0] > 1 else 0, group] for x in prompts)
            for t in range(query.shape[2]):
                seen = [s for s in range(key.shape[2]) if visible[b, t, s]]
                keys = torch.cat([prompt_key, key[b, group, seen]])
                values = torch.cat([prompt_value, value[b, group, seen]])
                out[b, h, t] = (query[b, h, t] @ keys.T * scale).softmax(0) @ values
    return out


@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "decoding", "longer-mask"])
@pytest.mark.parametrize("batch", [1, B])
def test_joining_prompts_and_words(kind: str, batch: int) -> None:
    queries = 1 if kind == "decoding" else S
    query, key, value = torch.randn(B, H, queries, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)
    prompts = torch.randn(batch, G, K, D), torch.randn(batch, G, K, D)
    causal = kind not in ("none", "decoding")
    visible = torch.ones(B, queries, S, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    mask: Tensor | None = None
    if kind in ("boolean", "additive", "longer-mask"):
        visible = visible.clone()
        visible[0, :, 0] = False
        mask = visible[:, None]
    if kind == "additive":
        mask = torch.zeros(B, 1, queries, S).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    if kind == "longer-mask":  # a static cache's mask may be longer than the keys
        mask = F.pad(visible[:, None], (0, 3), value=False)
    long_key, long_value, long_mask = concat_prefix(query, key, value, mask, kind in ("causal", "decoding"), prompts)
    assert long_key.shape == long_value.shape == (B, G, K + S, D)
    got = F.scaled_dot_product_attention(query, long_key, long_value, attn_mask=long_mask, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(got, joint_by_hand(query, key, value, visible, prompts, 0.4), atol=1e-5, rtol=1e-5)


def test_with_a_shared_softmax_heads_stay_grouped() -> None:
    module = prefix(gating=False, separate_softmax=False)
    key, value = module.keys_values(host(), torch.float32)
    assert key.shape == value.shape == (1, G, K, D)
    separate, _ = prefix(gating=False).keys_values(host(), torch.float32)
    assert separate.shape == (1, H, K, D)
    assert torch.equal(separate[:, : H // G], key[:, :1].expand(-1, H // G, -1, -1))


@pytest.mark.parametrize("shape", [(B, C), (B, 2, C), (B, 1, C + 1), (B, K + 1, C), (1, B, 1, C)])
def test_a_misshapen_context_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"must be \(batch, 1 or {K}, {C}\); got"):
        prefix().keys_values(host(), torch.float32, torch.zeros(shape))


def test_learned_keys_take_no_context() -> None:
    with pytest.raises(ConfigError, match="parametrization='prompt'"):
        prefix(parametrization="key_value").keys_values(host(), torch.float32, torch.zeros(B, 1, C))
