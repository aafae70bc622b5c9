"""timm's Vision Transformers: the formula with every option, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

import zinit
from tests.contract.cases import randomized, set_fused, timm_eva, timm_vit

OPEN = zinit.PrefixConfig(length=5, gate_init=0.7)
JOINT = zinit.PrefixConfig(length=5, gating=False, separate_softmax=False)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Blocks(nn.Module):
    """One timm attention module as a model of its own."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([attn])

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.blocks[0](x, **kwargs)


def by_hand(attn: Any, x: Tensor, prefix: Any, rope: Tensor | None = None, joint: bool = False) -> Tensor:
    """The adapted module written out: loops over samples and heads, rows of the weights picked by number; no hooks."""
    size, heads = attn.head_dim, attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if bias is None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if hasattr(attn, "q_bias") else torch.zeros(96)

    def part(x: Tensor, which: int, head: int) -> Tensor:
        rows = slice((which * heads + head) * size, (which * heads + head + 1) * size)
        return x @ weight[rows].T + bias[rows]

    def turned(x: Tensor) -> Tensor:
        if rope is None:
            return x
        first = attn.num_prefix_tokens
        return torch.cat([x[:first], apply_rot_embed_cat(x[None, None, first:], rope)[0, 0]])

    samples: list[Tensor] = []
    for sample in x:
        outs: list[Tensor] = []
        for head in range(heads):
            query = turned(attn.q_norm.forward(part(sample, 0, head)))
            key = turned(attn.k_norm.forward(part(sample, 1, head)))
            value = part(sample, 2, head)
            prompt_key = attn.k_norm.forward(part(prefix.prompt.weight, 1, head))
            prompt_value = part(prefix.prompt.weight, 2, head)
            words, prompts = query @ key.T * size**-0.5, query @ prompt_key.T * size**-0.5
            if joint:
                shares = torch.cat([prompts, words], dim=-1).softmax(-1)
                outs.append(shares @ torch.cat([prompt_value, value]))
            else:
                own = prompts.softmax(-1) @ prompt_value
                outs.append(words.softmax(-1) @ value + prefix.gate[head].tanh() * own)
        samples.append(attn.proj.forward(attn.norm.forward(torch.cat(outs, dim=-1))))
    return torch.stack(samples)


ATTENTIONS: dict[str, Any] = {
    "plain": lambda: Attention(32, num_heads=4),
    "bias": lambda: Attention(32, num_heads=4, qkv_bias=True),
    "norms": lambda: Attention(32, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
    "scale-norm": lambda: Attention(32, num_heads=4, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm),
    "eva": lambda: EvaAttention(32, num_heads=4, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("joint", [False, True], ids=["gated", "joint"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_formula_written_out(kind: str, joint: bool, fused: bool) -> None:
    torch.manual_seed(1)
    model = set_fused(randomized(Blocks(ATTENTIONS[kind]())), fused)
    attn: Any = model.blocks[0]  # pyright: ignore
    handle = zinit.attach(model, JOINT if joint else OPEN, backbone="vit")
    prefix = handle.prefixes["blocks.0"]
    x = torch.randn(2, 7, 32)
    ropes = [None, torch.randn(6, 16)] if kind == "eva" else [None]
    for rope in ropes:
        got = model(x) if rope is None else model(x, rope=rope)
        torch.testing.assert_close(got, by_hand(attn, x, prefix, rope, joint), atol=1e-5, rtol=1e-4)


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


def test_dropout_draws_the_same_numbers() -> None:
    model = timm_vit(attn_drop_rate=0.3, proj_drop_rate=0.3, drop_path_rate=0.3).train()
    torch.manual_seed(4)
    frozen = model(IMAGES)
    zinit.attach(model, zinit.PrefixConfig(length=5))
    torch.manual_seed(4)
    assert torch.equal(model(IMAGES), frozen)


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
    for site in handle.sites:
        seam: Any = site.module.zinit.seam  # pyright: ignore
        assert seam.query is None
        assert not seam.given


def test_rows_of_a_fused_projection() -> None:
    model = timm_vit(qk_norm=True)
    site = zinit.backbones.BACKBONES.get("vit").sites(model)[0]
    tokens, attn = torch.randn(5, 32), site.module
    _, key, value = attn.qkv(tokens).view(5, 3, 4, 8).unbind(1)  # pyright: ignore
    got_key, got_value = site.project_kv(attn, tokens)
    torch.testing.assert_close(got_key[0].transpose(0, 1), attn.k_norm(key))  # pyright: ignore
    torch.testing.assert_close(got_value[0].transpose(0, 1), value)


REFUSED = {
    "vit_relpos_small_patch16_224": "relative position",
    "beit_base_patch16_224": "relative position",
    "swin_tiny_patch4_window7_224": "relative position",
    "xcit_nano_12_p8_224": "no head_dim",
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
