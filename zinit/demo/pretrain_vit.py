"""Pretrain the demo's Vision Transformer: ``python -m zinit.demo.pretrain_vit --output DIR``.

It trains a tiny ViT from scratch to name shape, colour, pattern, size, background and count of the pictures of
:func:`zinit.demo.scenes.scenes`, none of which it sees twice, and writes the trunk in timm's format. The files in
``zinit/demo/vit`` were made by this script with its defaults. It is seeded and computes in one thread: the same
processor and library versions give the same files, however many cores there are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

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

console = Console(stderr=True)


def normalized(pictures: list[np.ndarray], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Pictures (32, 32, 3) of whole numbers as (B, 3, 32, 32)."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pictures (B, 3, 32, 32) and their labels (B, attributes)."""
    source = scenes.scenes(seed)
    while True:
        shown, pictures = zip(*islice(source, size), strict=True)
        yield normalized(list(pictures)), torch.tensor([scene.labels() for scene in shown])


def fit(modules: nn.Module, losses: Iterator[Tensor], steps: int, peak: float, decay: float = 0.05) -> None:
    """AdamW on a stream of losses: linear warm-up over a twentieth, then half a cosine to zero."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(20 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    modules.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps, loss=math.nan)
        for step, loss in enumerate(islice(losses, steps)):
            loss.backward()
            nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(bar, advance=1, loss=loss.item())
            if step % 100 == 0 and not console.is_terminal:
                console.print(f"step {step} loss {loss.item():.3f}")
    modules.eval()


@torch.inference_mode()
def accuracy(trunk: nn.Module, heads: nn.Module, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of pictures named rightly, by attribute."""
    parts = heads(trunk(pictures)).split(CLASSES, dim=-1)
    right = [(part.argmax(-1) == labels[:, i]).float().mean().item() for i, part in enumerate(parts)]
    return dict(zip(scenes.ATTRIBUTES, right, strict=True))


def save(trunk: VisionTransformer, output: Path) -> None:
    """The trunk in float16, and the configuration that ``timm.create_model("local-dir:...")`` reads."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in trunk.state_dict().items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "vit_tiny_patch16_224",  # every size of it is given anew
        "num_classes": 0,
        "num_features": trunk.num_features,
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
    """Train the trunk with one linear head for each attribute, write it to ``output``, report what it tells apart."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # so small a model gains little from more, and sums stay in one order
    torch.use_deterministic_algorithms(True)
    trunk = VisionTransformer(**ARGS)
    heads = nn.Linear(trunk.num_features, sum(CLASSES))
    console.print(f"{sum(p.numel() for p in trunk.parameters()):,} parameters")

    def losses() -> Iterator[Tensor]:
        for pictures, labels in batches(batch_size, seed):
            parts = heads(trunk(pictures)).split(CLASSES, dim=-1)
            yield torch.stack([F.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]).sum()

    fit(nn.ModuleList([trunk, heads]), losses(), steps, peak)
    save(trunk, output)
    for name, share in accuracy(trunk, heads, *next(batches(1000, seed + 1))).items():
        console.print(f"accuracy on new pictures, {name}: {share:.3f}")
    return trunk


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's Vision Transformer on procedural pictures.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model files")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--peak", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output, args.steps, args.batch_size, args.peak, args.seed)


if __name__ == "__main__":
    main()
