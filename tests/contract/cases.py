"""Tiny random models for every backbone of the registry, and what the contract needs to know about each.

A new backbone needs one entry in `CASES`; `test_backbone.py::test_every_backbone_has_a_tiny_model` fails until it has.
Everything else picks it up unasked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def text_batch(padding: str, vocabulary: int = 61) -> Batch:
    """Three ragged texts of 9, 6 and 2 words; ``padding`` is "left", "right" or "none" (all of 9 words)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 6, 2)):
        if padding == "left":
            mask[row, : 9 - length] = 0
        elif padding == "right":
            mask[row, length:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def randomized(model: nn.Module) -> nn.Module:
    """Gives every parameter a life of its own, norms and biases too, so that nothing cancels by being 0 or 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if parameter.dim() < 2:
                start = parameter if parameter.unique().numel() == 1 else 0  # else it was drawn, from torch's generator
                parameter.copy_(start + 0.2 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    return model.eval()


def causal_lm(kind: str, **changes: Any) -> nn.Module:
    """A decoder of three layers: C 32, H 4, G 2, D 8 unless changed."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    config._attn_implementation = "sdpa"
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


def encoder(kind: str, **changes: Any) -> nn.Module:
    """A masked language model of three bidirectional layers: C 32, H 4, D 8 unless changed."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "embedding_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    config._attn_implementation = "sdpa"
    return randomized(transformers.AutoModelForMaskedLM.from_config(config))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL_TEXT = SMALL | {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": 2}
SMALL_VISION = SMALL | {"image_size": 16, "patch_size": 4}


def clip_tower(kind: str) -> nn.Module:
    """CLIP's text ("Text") or vision ("Vision") model alone."""
    import transformers

    config = getattr(transformers, f"CLIP{kind}Config")(**{"Text": SMALL_TEXT, "Vision": SMALL_VISION}[kind])
    config._attn_implementation = "sdpa"
    return randomized(getattr(transformers, f"CLIP{kind}Model")(config))


def timm_vit(*, fused: bool = True, **changes: Any) -> nn.Module:
    """timm's Vision Transformer of three layers: C 32, H 4, D 8, 16 patches."""
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
    return set_fused(randomized(VisionTransformer(**shape | changes)), fused)


def timm_eva(*, fused: bool = True, **changes: Any) -> nn.Module:
    """timm's EVA of three layers: rotations, optionally with norms inside the attention."""
    from timm.models.eva import Eva

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
    return set_fused(randomized(Eva(**shape | {"use_rot_pos_emb": True, "qkv_fused": False} | changes)), fused)


def timm_beit(*, fused: bool = True, **changes: Any) -> nn.Module:
    """timm's BEiT of three layers: biases of relative position, its query behind no norm."""
    from timm.models.beit import Beit

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
    return set_fused(frozen_biases(randomized(Beit(**shape | {"use_rel_pos_bias": True} | changes))), fused)


def timm_swin(*, fused: bool = True, **changes: Any) -> nn.Module:
    """timm's Swin of three blocks, one of them shifted: C 32, H 4, D 8, four windows of four patches."""
    from timm.models.swin_transformer import SwinTransformer

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depths": (3,), "num_heads": (4,), "window_size": 2}
    others = {"num_classes": 7, "drop_path_rate": 0.0}
    return set_fused(frozen_biases(randomized(SwinTransformer(**shape | others | changes))), fused)


def frozen_biases(model: nn.Module) -> nn.Module:
    """Freezes what is added to scores, as attaching does: torch attends by other kernels where that trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] != "relative_position_bias_table")
    return model


def set_fused(model: nn.Module, fused: bool) -> nn.Module:
    """Chooses between timm's two ways to attend."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused  # pyright: ignore[reportAttributeAccessIssue]
    return model


def image_batch(padding: str) -> Batch:
    """Three images of 16 x 16; there is nothing to pad."""
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def last_hidden(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).last_hidden_state


def class_scores(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    pixels = batch["pixel_values"].to(next(model.parameters()).dtype)  # timm casts nothing
    return model(pixels, **kwargs)


def clip() -> nn.Module:
    """A whole CLIP: two towers of three layers, both 32 wide."""
    import transformers

    config = transformers.CLIPConfig(text_config=SMALL_TEXT, vision_config=SMALL_VISION, projection_dim=16)
    config._attn_implementation = "sdpa"
    return randomized(transformers.CLIPModel(config))


def caption_batch(padding: str) -> Batch:
    """Three images with their captions."""
    return text_batch(padding) | image_batch(padding)


def both_embeddings(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    output = model(**batch, **kwargs)
    return torch.cat([output.image_embeds, output.text_embeds], dim=-1)


def logits(model: nn.Module, batch: Batch, **kwargs: Any) -> Tensor:
    return model(**batch, **kwargs).logits


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model.

    Attributes:
        name: of the case.
        backbone: the registry's name.
        build: makes it, always with the same weights, in evaluation mode.
        batch: its input, given the side to pad on.
        output: the tensor that the contract compares. Keyword arguments go to the model.
        paddings: sides that its input can be padded on ("none" where there is nothing to pad).
        implementations: of attention that it runs with on a CPU; none where the model offers no choice.
        generates: whether it has ``generate``.
        width: C of the topmost site.
    """

    name: str
    backbone: str
    build: Callable[[], nn.Module]
    batch: Callable[[str], Batch] = text_batch
    output: Callable[..., Tensor] = field(default=logits)
    paddings: tuple[str, ...] = ("left", "right")
    implementations: tuple[str, ...] = ("sdpa", "eager")
    generates: bool = True
    width: int = 32

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = [
    Case(name="llama", backbone="llama", build=lambda: causal_lm("Llama")),
    Case(
        name="llama-bias-wide-heads",
        backbone="llama",
        build=lambda: causal_lm("Llama", head_dim=12, attention_bias=True, tie_word_embeddings=True),
    ),
    Case(name="mistral", backbone="llama", build=lambda: causal_lm("Mistral", sliding_window=4)),
    Case(name="qwen2", backbone="llama", build=lambda: causal_lm("Qwen2")),
    *(
        Case(name=name, backbone="roberta", build=lambda kind=kind: encoder(kind), generates=False)
        for name, kind in {
            "roberta": "Roberta",
            "bert": "Bert",
            "camembert": "Camembert",
            "electra": "Electra",
            "xlm-roberta": "XLMRoberta",
        }.items()
    ),
    Case(name="clip", backbone="clip", build=clip, batch=caption_batch, output=both_embeddings, generates=False),
    Case(
        name="clip-vision",
        backbone="clip",
        build=lambda: clip_tower("Vision"),
        batch=image_batch,
        output=last_hidden,
        paddings=(),
        generates=False,
    ),
    Case(name="clip-text", backbone="clip", build=lambda: clip_tower("Text"), output=last_hidden, generates=False),
    *(
        Case(
            name=name,
            backbone="vit",
            build=build,
            batch=image_batch,
            output=class_scores,
            paddings=(),
            implementations=(),
            generates=False,
        )
        for name, build in {
            "vit": timm_vit,
            "vit-norms-registers-unfused": lambda: timm_vit(
                fused=False, qk_norm=True, scale_attn_norm=True, reg_tokens=2, no_embed_class=True, init_values=0.5
            ),
            "eva": timm_eva,
            "beit": timm_beit,
        }.items()
    ),
    Case(name="gpt-neox", backbone="transformers", build=lambda: causal_lm("GPTNeoX")),
    Case(
        name="deepseek-v3",
        backbone="transformers",
        build=lambda: causal_lm(
            "DeepseekV3",
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=6,
            first_k_dense_replace=3,
        ),
    ),
]
