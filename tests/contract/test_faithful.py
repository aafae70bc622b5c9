"""Details that a wrong implementation gets wrong without a word: scales, rotations, dtypes, dropout, seeds, factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface
from transformers.models.bart.modeling_bart import BartAttention

import zinit
from tests.contract.cases import Case, causal_lm, randomized, set_fused, text_batch
from tests.contract.checks import OPEN, run
from zinit.backbones._hf import attend
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext
from zinit.methods.bottleneck import BottleneckLayer
from zinit.prefix import attend_prompts

# --- the scale on the scores ------------------------------------------------------------------------------------------


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_model": 32, "vocab_size": 61}
    config = transformers.T5Config(**sizes, pad_token_id=0)
    return randomized(transformers.T5EncoderModel(config))


SCALES: dict[str, tuple[Any, float]] = {
    "t5": (t5, 1.0),
    "granite": (lambda: causal_lm("Granite", attention_multiplier=0.11), 0.11),
    "llama": (lambda: causal_lm("Llama"), 8**-0.5),
}


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_the_scale_is_the_host_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, scale = SCALES[name]
    model: Any = build()
    model.set_attn_implementation("eager")
    handle = zinit.attach(model, zinit.PrefixConfig(length=5, gate_init=0.7), seed=0)
    prefixes = {id(site.module): (site, handle.prefixes[site.name]) for site in handle.sites}
    seen = 0

    def compare(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        nonlocal seen
        output, weights = attend(module, query, key, value, mask, **kwargs)
        with handle.disabled():
            words, _ = attend(module, query, key, value, mask, **kwargs)
        site, prefix = prefixes[id(module)]
        prompt_key, prompt_value = site.project_kv(module, prefix.get_parameter("prompt.weight"))
        shared_by = site.num_heads // site.num_kv_heads
        prompt_key, prompt_value = (x.repeat_interleave(shared_by, dim=1) for x in (prompt_key, prompt_value))
        shares = (query @ prompt_key.transpose(2, 3) * scale).softmax(-1)
        assert shares.std() > 1e-2, "another scale would not show"
        expected = prefix.gates().view(1, -1, 1, 1) * (shares @ prompt_value)
        torch.testing.assert_close(output - words, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)
        seen += 1
        return output, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "zinit", compare)
    model(**text_batch("right"))
    assert seen == len(handle.sites)


# --- timm: scale, rotation, dropout -----------------------------------------------------------------------------------


class Alone(nn.Module):
    """One attention module of timm as a model of its own."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([attn])

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.blocks[0](x, **kwargs)


def of_timm(
    attn: Any, x: Tensor, prefix: Any, *, joint: bool, rope: Tensor | None = None, half: bool = False
) -> Tensor:
    """The module written out: its own scale, pairs of a rotation as it pairs them, no dropout."""
    heads, first = attn.num_heads, getattr(attn, "num_prefix_tokens", 0)

    def split(x: Tensor) -> list[Tensor]:
        bias = attn.qkv.bias
        if bias is None and getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        rows = F.linear(x, attn.qkv.weight, bias)
        return [part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in rows.chunk(3, dim=-1)]

    def turned(x: Tensor) -> Tensor:
        if rope is None:
            return x
        return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], dim=2)

    (query, key, value), (_, prompt_key, prompt_value) = split(x), split(prefix.prompt.weight)
    query, key = turned(query), turned(key)
    words = query @ key.transpose(-2, -1) * attn.scale
    prompts = query @ prompt_key.transpose(-2, -1) * attn.scale
    if joint:
        out = torch.cat([prompts, words], -1).softmax(-1) @ torch.cat(
            [prompt_value.expand(len(x), -1, -1, -1), value], 2
        )
    else:
        out = words.softmax(-1) @ value + prefix.gates().view(-1, 1, 1) * (prompts.softmax(-1) @ prompt_value)
    return attn.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("joint", [False, True], ids=["gated", "joint"])
@pytest.mark.parametrize("kind", ["scale", "dropout", "rotate-half", "rotate-pairs"])
@torch.no_grad()
def test_a_module_of_timm_is_followed_in_everything(kind: str, joint: bool) -> None:
    torch.manual_seed(0)
    x, rope = torch.randn(2, 6, 32), None
    if "rotate" in kind:
        options: dict[str, Any] = {"qk_norm": False, "scale_norm": False, "num_prefix_tokens": 1}
        attn: Any = EvaAttention(32, num_heads=4, rotate_half=kind == "rotate-half", **options)
        rope = torch.randn(5, 16)
    else:
        attn = Attention(32, num_heads=4, qkv_bias=True, attn_drop=0.5 if kind == "dropout" else 0.0)
    if kind == "scale":
        attn.scale = 0.9
    model = set_fused(randomized(Alone(attn)), "rotate" in kind)  # the fused kernel asks no scale
    gate: dict[str, Any] = {"gating": False, "separate_softmax": False} if joint else {"gate_init": 0.7}
    handle = zinit.attach(model, zinit.PrefixConfig(length=5, **gate), backbone="vit", seed=0)
    (prefix,) = handle.prefixes.values()
    given = {} if rope is None else {"rope": rope}
    expected = of_timm(attn, x, prefix, joint=joint, rope=rope, half=kind == "rotate-half")
    torch.testing.assert_close(model(x, **given), expected, atol=1e-5, rtol=1e-4)


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_the_prompts_softmax_runs_in_float32() -> None:
    """Between scores of some dozens bfloat16 has steps of a quarter."""
    generator = torch.Generator().manual_seed(0)
    query = 10 * torch.randn(1, 2, 40, 8, generator=generator).bfloat16()
    key, value = (torch.randn(1, 2, 30, 8, generator=generator).bfloat16() for _ in range(2))
    exact = (query.double() @ key.double().mT).softmax(-1) @ value.double()
    rough = (query @ key.mT).softmax(-1) @ value
    assert (rough - exact).abs().max() > 0.05, "bfloat16 would do as well here"
    assert (attend_prompts(query, key, value, 1.0) - exact).abs().max() < 0.02


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_layer_may_be_of_another_dtype_than_its_model(other: torch.dtype) -> None:
    """As quantisation libraries leave some layers; what is computed ahead is in the layer's own dtype."""
    whole = torch.bfloat16 if other == torch.float32 else torch.float32
    model: Any = causal_lm("Llama").to(whole)
    odd = model.model.layers[1].self_attn.to(other)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        states, turns = kwargs["hidden_states"].to(other), kwargs["position_embeddings"]
        return args, kwargs | {"hidden_states": states, "position_embeddings": tuple(x.to(other) for x in turns)}

    odd.register_forward_pre_hook(enter, with_kwargs=True)
    odd.register_forward_hook(lambda module, args, output: (output[0].to(whole), *output[1:]))
    model.set_attn_implementation("eager")
    handle = zinit.attach(model, OPEN, seed=0)
    batch = text_batch("none")
    expected = model(**batch, use_cache=False).logits
    with handle.disabled():
        assert not torch.equal(model(**batch, use_cache=False).logits, expected)
    with handle.cached_kv():
        cached = {name: pair[0].dtype for name, pair in handle.state.scope().cached.pairs.items()}  # pyright: ignore
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
    assert cached == {"model.layers.1.self_attn": other, "model.layers.2.self_attn": whole}


# --- what stands in a run's settings ----------------------------------------------------------------------------------


def test_no_two_layers_start_alike(case: Case) -> None:
    for seed in (None, 0):
        handle = zinit.attach(case.build(), zinit.PrefixConfig(length=3), seed=seed)
        prompts = [prefix.get_parameter("prompt.weight") for prefix in handle.prefixes.values()]
        for index, prompt in enumerate(prompts):
            assert not any(torch.equal(prompt, other) for other in prompts[:index])


def test_a_context_comes_before_what_was_computed_ahead(case: Case) -> None:
    model = case.build()
    handle = zinit.attach(model, OPEN, seed=0)
    context = torch.randn(3, 1, case.width, generator=torch.Generator().manual_seed(5))
    without, expected = run(case, model), run(case, model, zinit_context=context)
    for scope in (handle.cached_kv, handle.frozen_prefix):
        with scope():
            torch.testing.assert_close(run(case, model), without)
            assert torch.equal(run(case, model, zinit_context=context), expected)
            torch.testing.assert_close(run(case, model), without)


def adapted(name: str, case: Case, **settings: Any) -> tuple[Any, Any]:
    model, method = case.build(), METHODS.get(name)
    context = ApplyContext(prefix=zinit.PrefixConfig(length=3), backbone=case.backbone, seed=0)
    return model, method(method.Config(**settings)).apply(model, context)


def test_gated_prefix_tuning_goes_from_the_host_to_prefix_tuning(leader: Case) -> None:
    """Gates of one are plain prefix tuning, gates of zero the host, and what it starts at is zero."""
    plain, there = adapted("prefix-tuning", leader)
    model, method = adapted("gated-prefix-tuning", leader)
    assert torch.equal(run(leader, model), run(leader, leader.build()))
    with torch.no_grad():
        for name, prefix in method.handle.prefixes.items():
            prefix.gate.fill_(20.0)  # tanh is one
            prefix.get_parameter("prompt.weight").copy_(there.handle.prefixes[name].get_parameter("prompt.weight"))
    torch.testing.assert_close(run(leader, model), run(leader, plain), atol=1e-5, rtol=1e-4)


def test_prefix_tuning_has_one_softmax(leader: Case) -> None:
    model, method = adapted("prefix-tuning", leader)
    joint, apart = leader.build(), leader.build()
    zinit.attach(joint, zinit.PrefixConfig(length=3, gating=False, separate_softmax=False), seed=0)
    zinit.attach(apart, zinit.PrefixConfig(length=3, gating=False), seed=0)
    assert torch.equal(run(leader, model), run(leader, joint))
    assert not torch.allclose(run(leader, model), run(leader, apart), atol=1e-4)
    assert not method.handle.config.separate_softmax


def test_a_bottleneck_adds_to_what_it_is_given() -> None:
    layer = BottleneckLayer(8, 4, torch.Generator().manual_seed(0))
    nn.init.normal_(layer.up.weight)
    hidden = torch.randn(2, 3, 8)
    inner = F.gelu(hidden @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias
    torch.testing.assert_close(layer(hidden), hidden + inner)
    assert inner.abs().max() > 0.1


@pytest.mark.parametrize(("rank", "alpha"), [(2, 8.0), (4, 4.0)])
def test_lora_scales_its_update_by_alpha_over_rank(rank: int, alpha: float) -> None:
    model: Any = causal_lm("Llama")
    method = METHODS.get("lora")
    settings = method.Config(rank=rank, alpha=alpha, dropout=0.0)
    context = ApplyContext(prefix=zinit.PrefixConfig(length=3), backbone="llama", seed=0)
    method(settings).apply(model, context)
    layer = model.model.layers[1].self_attn.q_proj
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    nn.init.normal_(up)
    x = torch.randn(2, 3, 32)
    expected = x @ layer.base_layer.weight.T + alpha / rank * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


# --- which of two attentions is the self-attention --------------------------------------------------------------------


class Two(nn.Module):
    """A layer with two attentions of one class that may look elsewhere; neither name says which does."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.first, self.second = (BartAttention(32, 4, config=config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0], key_value_states=x)[0]


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.BartConfig(d_model=32)
        config._attn_implementation = "sdpa"
        self.config, self.layers = config, nn.ModuleList([Two(config)])


def test_of_two_attentions_that_may_look_elsewhere_neither_is_taken() -> None:
    with pytest.raises(zinit.BackboneError, match=r"takes key_value_states, and layers\.0\.second may be"):
        zinit.attach(OfTwo())
