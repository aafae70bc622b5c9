"""timm's Vision Transformers: the formula with every option, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from timm.layers import RelPosBias, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

import zinit
from tests.contract.cases import randomized, set_fused, timm_beit, timm_eva, timm_swin, timm_vit
from zinit.backbones import vit
from zinit.methods import METHODS
from zinit.methods.base import ApplyContext

OPEN = zinit.PrefixConfig(length=5, gate_init=0.7)
WAYS = {
    "gated": OPEN,
    "joint": zinit.PrefixConfig(length=5, gating=False, separate_softmax=False),
    "joint-gated": zinit.PrefixConfig(length=5, gate_init=0.7, separate_softmax=False),
}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Blocks(nn.Module):
    """One timm attention module as a model of its own."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([attn])

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.blocks[0](x, **kwargs)


def by_hand(
    attn: Any,
    x: Tensor,
    prefix: Any,
    rope: Tensor | None = None,
    way: str = "gated",
    given: dict[str, Tensor] | None = None,
) -> Tensor:
    """The adapted module written out, without hooks: loops over samples and heads, rows of the weights picked by
    number, biases of relative position looked up place by place. ``given`` is what is added to the scores besides.
    """
    heads, size = attn.num_heads, attn.proj.in_features // attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    elif bias is None:
        bias = torch.zeros(len(weight))
    q_norm, k_norm, norm = (getattr(attn, name, nn.Identity()).forward for name in ("q_norm", "k_norm", "norm"))
    module = attn.rel_pos if getattr(attn, "rel_pos", None) is not None else attn
    table = getattr(module, "relative_position_bias_table", None)

    def part(x: Tensor, which: int, head: int) -> Tensor:
        rows = slice((which * heads + head) * size, (which * heads + head + 1) * size)
        return x @ weight[rows].T + bias[rows]

    def turned(x: Tensor) -> Tensor:
        if rope is None:
            return x
        first = attn.num_prefix_tokens
        return torch.cat([x[:first], apply_rot_embed_cat(x[None, None, first:], rope)[0, 0]])

    samples: list[Tensor] = []
    for place, sample in enumerate(x):
        outs: list[Tensor] = []
        for head in range(heads):
            query, key = turned(q_norm(part(sample, 0, head))), turned(k_norm(part(sample, 1, head)))
            value, prompt_value = part(sample, 2, head), part(prefix.prompt.weight, 2, head)
            words = query @ key.T * size**-0.5
            if table is not None:
                places = module.relative_position_index.view(len(sample), len(sample)).tolist()
                words = words + torch.stack([torch.stack([table[i, head] for i in row]) for row in places])
            for name, term in (given or {}).items():
                words = words + (term[place % len(term)] if name == "mask" else term[0, head])
            prompts = query @ k_norm(part(prefix.prompt.weight, 1, head)).T * size**-0.5
            shares = torch.cat([prompts, words], dim=-1).softmax(-1)
            both, own = shares @ torch.cat([prompt_value, value]), words.softmax(-1) @ value
            if way == "joint":
                outs.append(both)
            elif way == "joint-gated":
                outs.append((1 - prefix.gate[head].tanh()) * own + prefix.gate[head].tanh() * both)
            else:
                outs.append(own + prefix.gate[head].tanh() * (prompts.softmax(-1) @ prompt_value))
        samples.append(attn.proj.forward(norm(torch.cat(outs, dim=-1))))
    return torch.stack(samples)


ATTENTIONS: dict[str, Any] = {
    "plain": lambda: Attention(32, num_heads=4),
    "bias": lambda: Attention(32, num_heads=4, qkv_bias=True),
    "norms": lambda: Attention(32, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
    "scale-norm": lambda: Attention(32, num_heads=4, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm),
    "eva": lambda: EvaAttention(32, num_heads=4, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_formula_written_out(kind: str, way: str, fused: bool) -> None:
    torch.manual_seed(1)
    model = set_fused(randomized(Blocks(ATTENTIONS[kind]())), fused)
    attn: Any = model.blocks[0]  # pyright: ignore
    handle = zinit.attach(model, WAYS[way], backbone="vit")
    prefix = handle.prefixes["blocks.0"]
    x = torch.randn(2, 7, 32)
    ropes = [None, torch.randn(6, 16)] if kind == "eva" else [None]
    for rope in ropes:
        got = model(x) if rope is None else model(x, rope=rope)
        torch.testing.assert_close(got, by_hand(attn, x, prefix, rope, way), atol=1e-5, rtol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 3},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "dynamic": {"dynamic_img_size": True},
    "norms": {"qk_norm": True, "scale_attn_norm": True},
    "layer-scale": {"init_values": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_fused_and_unfused_agree(option: str) -> None:
    outputs: list[Tensor] = []
    for fused in (True, False):
        model = timm_vit(fused=fused, **OPTIONS[option])
        frozen = model(IMAGES)
        handle = zinit.attach(model, zinit.PrefixConfig(length=5), seed=0)
        assert torch.equal(model(IMAGES), frozen)
        handle.detach()
        zinit.attach(model, OPEN, seed=0)
        outputs.append(model(IMAGES))
        assert (outputs[-1] - frozen).abs().max() > 1e-2
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_images_of_any_size() -> None:
    model = timm_vit(dynamic_img_size=True)
    handle = zinit.attach(model, OPEN, seed=0)
    for size in (16, 24, 32):
        images = torch.randn(2, 3, size, size)
        opened = model(images)
        with handle.disabled():
            assert not torch.equal(model(images), opened)


@pytest.mark.parametrize("separate", [True, False])
def test_dropout_draws_the_same_numbers(separate: bool) -> None:
    model = timm_vit(attn_drop_rate=0.3, proj_drop_rate=0.3, drop_path_rate=0.3).train()
    torch.manual_seed(4)
    frozen = model(IMAGES)
    zinit.attach(model, zinit.PrefixConfig(length=5, separate_softmax=separate))
    torch.manual_seed(4)
    assert torch.equal(model(IMAGES), frozen)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_gates_learn_from_prompts_and_not_from_dropout(fused: bool) -> None:
    """One module is linear in the gate: its gradient is the same with dropout and without."""
    model = set_fused(randomized(Blocks(Attention(32, num_heads=4, attn_drop=0.3))), fused)
    config = zinit.PrefixConfig(length=5, gate_init=0.3, separate_softmax=False)
    gate = zinit.attach(model, config, backbone="vit", seed=0).prefixes["blocks.0"].gate
    x, weight = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    outputs = [model.train()(x), model.eval()(x)]
    assert not torch.allclose(*outputs, atol=1e-2)
    noisy, clean = (torch.autograd.grad((output * weight).sum(), [gate])[0] for output in outputs)
    torch.testing.assert_close(noisy, clean, atol=1e-4, rtol=1e-4)


def test_attaching_leaves_the_mode_of_every_module() -> None:
    model = timm_vit().train()
    model.blocks[1].eval()  # pyright: ignore
    before = {name: module.training for name, module in model.named_modules()}
    zinit.attach(model, OPEN).detach()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_nothing_of_a_forward_is_kept() -> None:
    model = timm_eva()
    handle = zinit.attach(model, OPEN)
    model(IMAGES)
    assert len(handle.sites) > 1
    assert vit._forward_here() is None
    expected = model(IMAGES)
    attention: Any = handle.sites[1].module

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise ZeroDivisionError

    hook = attention.q_norm.register_forward_hook(fail)  # between the query and its use
    with pytest.raises(ZeroDivisionError):
        model(IMAGES + 1)
    hook.remove()
    assert torch.equal(model(IMAGES), expected)
    assert vit._forward_here() is None


def test_rows_of_a_fused_projection() -> None:
    model = timm_vit(qk_norm=True)
    site = zinit.backbones.BACKBONES.get("vit").sites(model)[0]
    tokens, attn = torch.randn(5, 32), site.module
    _, key, value = attn.qkv(tokens).view(5, 3, 4, 8).unbind(1)  # pyright: ignore
    got_key, got_value = site.project_kv(attn, tokens)
    torch.testing.assert_close(got_key[0].transpose(0, 1), attn.k_norm(key))  # pyright: ignore
    torch.testing.assert_close(got_value[0].transpose(0, 1), value)


REFUSED = {
    "swinv2_tiny_window8_256": "relative position",
    "efficientformer_l1": "relative position",
    "xcit_nano_12_p8_224": "no scale",
    "gcvit_xxtiny": "q_global",
    "resnet18": "no attention of a Vision Transformer's kind",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(zinit.BackboneError, match=REFUSED[name]) as error:
        zinit.attach(model)
    assert "register" in str(error.value)
    assert not any(hasattr(module, "zinit") for module in model.modules())


def test_the_difference_of_two_softmaxes_is_refused() -> None:
    before = timm_vit(attn_layer="diff")
    with pytest.raises(zinit.BackboneError, match=r"DiffAttention.*difference of two softmaxes"):
        zinit.attach(before)


def test_a_gated_output_is_refused() -> None:
    before = timm_vit()
    attention = before.blocks[1].attn
    attention.gate = torch.nn.Linear(attention.qkv.in_features, attention.proj.in_features)
    with pytest.raises(zinit.BackboneError, match=r"blocks.1.attn.*gates its attention's output"):
        zinit.attach(before)


def test_another_formula_behind_the_same_names_is_refused() -> None:
    class Sharper(Attention):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = self.q_norm(q), self.k_norm(k)
            shares = (2 * self.scale * q @ k.transpose(-2, -1)).softmax(-1)
            return self.proj(self.norm((shares @ v).transpose(1, 2).flatten(2)))

    with pytest.raises(zinit.BackboneError, match="not the plain softmax"):
        zinit.attach(randomized(Blocks(Sharper(32, num_heads=4))), backbone="vit")


def beit_attention() -> nn.Module:
    return BeitAttention(32, num_heads=4, qkv_bias=True, window_size=(2, 3))


def relative_attention() -> nn.Module:
    places = functools.partial(RelPosBias, window_size=(2, 3))
    return RelPosAttention(32, num_heads=4, qkv_bias=True, qk_norm=True, rel_pos_cls=places)  # pyright: ignore


BIASED: dict[str, Any] = {
    "beit": (beit_attention, 7, {"shared_rel_pos_bias": torch.randn(1, 4, 7, 7)}),
    "vit-relpos": (relative_attention, 6, {}),
    "vit-srelpos": (lambda: RelPosAttention(32, num_heads=4), 6, {"shared_rel_pos": torch.randn(1, 4, 6, 6)}),
    "swin": (lambda: WindowAttention(32, num_heads=4, window_size=(2, 3)), 6, {"mask": torch.randn(2, 6, 6)}),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", sorted(BIASED))
def test_biases_of_relative_position_written_out(kind: str, way: str, fused: bool) -> None:
    """Scores per sample and head in plain loops, the biases looked up place by place."""
    torch.manual_seed(1)
    make, count, extra = BIASED[kind]
    model = set_fused(randomized(Blocks(make())), fused).requires_grad_(False)  # a bias that trains has other kernels
    attn: Any = model.blocks[0]  # pyright: ignore
    x = torch.randn(4, count, 32)  # two pictures of two windows, for Swin
    for given in ({}, extra) if extra else ({},):
        frozen = model(x, **given)
        zinit.attach(model, zinit.PrefixConfig(length=5), backbone="vit", seed=0)
        assert torch.equal(model(x, **given), frozen)
        zinit.get_handle(model).detach()
        handle = zinit.attach(model, WAYS[way], backbone="vit", seed=0)
        got = model(x, **given)
        assert (got - frozen).abs().max() > 1e-2
        expected = by_hand(attn, x, handle.prefixes["blocks.0"], way=way, given=given)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        handle.detach()


def test_windows() -> None:
    """A whole Swin: frozen while closed; open, all gets a gradient; a route or context is refused."""
    model = timm_swin()
    frozen = model(IMAGES)
    closed = zinit.attach(model, zinit.PrefixConfig(length=5), seed=0)
    assert torch.equal(model(IMAGES), frozen)
    closed.detach()
    handle = zinit.attach(model, OPEN, seed=0)
    model(IMAGES).square().sum().backward()
    for name, parameter in handle.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in IMAGES])
        torch.testing.assert_close(model(IMAGES), alone, atol=1e-5, rtol=1e-4)
        for scope in (handle.route(["default", None]), handle.context(torch.zeros(2, 1, 32))):
            with pytest.raises(zinit.ConfigError, match="within windows"), scope:
                model(IMAGES)
    handle.detach()
    assert torch.equal(model(IMAGES), frozen)


@pytest.mark.parametrize("kind", ["qkv", "q_norm"])
def test_the_query_is_the_one_that_the_host_used(kind: str) -> None:
    """Also where something changes the projection after attaching, as LoRA does."""
    attn: Any = WindowAttention(32, num_heads=4, window_size=(2, 3)) if kind == "qkv" else Attention(32, num_heads=4)
    model = randomized(Blocks(attn)).requires_grad_(False)
    x = torch.randn(4, 6, 32)
    zinit.attach(model, OPEN, backbone="vit", seed=0)
    rows, change = slice(0, 32), torch.randn(32, 32)
    plain = attn.qkv.forward
    attn.qkv.forward = lambda x: plain(x) + F.pad(x @ change, (0, 64))
    changed = model(x)
    attn.qkv.forward = plain
    attn.qkv.weight[rows] += change.T
    torch.testing.assert_close(changed, model(x), atol=1e-5, rtol=1e-4)


def test_lora_is_refused_where_it_would_change_nothing() -> None:
    with pytest.raises(zinit.ConfigError, match=r"LoRA would change nothing in blocks\.0\.attn: Attention reads"):
        METHODS.get("lora")(METHODS.get("lora").Config()).apply(
            timm_beit(), ApplyContext(prefix=zinit.PrefixConfig(), backbone="vit", seed=0)
        )
