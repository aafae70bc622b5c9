"""Pretrain the demo's Vision Transformer: ``python -m scripts.pretrain_vit --output DIR``.

It trains a tiny ViT from scratch to name shape, colour, pattern, size, background and count of the images of
:func:`zinit.demo.scenes.scenes`, none of which it sees twice, and writes the backbone in timm's format. The files in
``zinit/demo/vit`` were made by this script with its defaults. It is seeded and computes in one thread: the same
processor and library versions give the same files, however many cores there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.pretraining import command, console, fit, seed_everything
from zinit.demo import scenes

MEAN = STD = (0.5, 0.5, 0.5)
ARGS: dict[str, Any] = {
    "img_size": scenes.SIZE,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
}
CLASSES = [len(names) for names in scenes.ATTRIBUTES.values()]


def normalized(images: list[np.ndarray], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """uint8 images (32, 32, 3) as a float batch (B, 3, 32, 32)."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless images (B, 3, 32, 32) and their labels (B, attributes)."""
    source = scenes.scenes(seed)
    while True:
        shown, images = zip(*islice(source, size), strict=True)
        yield normalized(list(images)), torch.tensor([scene.labels() for scene in shown])


@torch.inference_mode()
def accuracy(backbone: nn.Module, heads: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The fraction of images named correctly, by attribute."""
    parts = heads(backbone(images)).split(CLASSES, dim=-1)
    right = [(part.argmax(-1) == labels[:, i]).float().mean().item() for i, part in enumerate(parts)]
    return dict(zip(scenes.ATTRIBUTES, right, strict=True))


def save(backbone: VisionTransformer, output: Path) -> None:
    """The backbone in float16, and the configuration that ``timm.create_model("local-dir:...")`` reads."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in backbone.state_dict().items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_tiny_patch16_224",  # model_args override all of its sizes
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": "token",
        "model_args": ARGS,
        "pretrained_cfg": {
            "tag": "zinit_demo",
            "num_classes": 0,
            "input_size": [3, scenes.SIZE, scenes.SIZE],
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": MEAN,
            "std": STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def pretrain(output: Path, steps: int, batch_size: int, peak: float, seed: int) -> VisionTransformer:
    """Train the backbone with a linear head for each attribute, write it to ``output``, report its accuracy."""
    seed_everything(seed)
    backbone = VisionTransformer(**ARGS)
    heads = nn.Linear(backbone.num_features, sum(CLASSES))
    console.print(f"{sum(p.numel() for p in backbone.parameters()):,} parameters")

    def losses() -> Iterator[Tensor]:
        for images, labels in batches(batch_size, seed):
            parts = heads(backbone(images)).split(CLASSES, dim=-1)
            yield torch.stack([F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]).sum()

    fit(nn.ModuleList([backbone, heads]), losses(), steps, peak, warmup=steps / 20)
    save(backbone, output)
    for name, fraction in accuracy(backbone, heads, *next(batches(1000, seed + 1))).items():
        console.print(f"accuracy on new images, {name}: {fraction:.3f}")
    return backbone


if __name__ == "__main__":
    command(
        pretrain, "Pretrain the demo's Vision Transformer on procedural images.", steps=2400, batch_size=64, peak=2e-3
    )
