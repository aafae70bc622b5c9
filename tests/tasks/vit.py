"""Tiny ViTs, images and folders of them for the tests of VTAB-1k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from zinit.tasks.base import TaskInputs
from zinit.tasks.vtab.task import VTAB, VTABConfig

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
ARCHITECTURE = "vit_tiny_patch16_224"


def tiny(**changes: Any) -> Any:
    """A random ViT without classifier: C 32, 16 patches; every weight random, as a trained one's are."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = VisionTransformer(**{**SHAPE, "num_classes": 0, **changes})
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def save_tiny(folder: Path) -> Path:
    """In timm's format."""
    folder.mkdir(exist_ok=True)
    save_file(tiny().state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "classifier": "head"}
    config = {"architecture": ARCHITECTURE, "num_classes": 0, "model_args": SHAPE, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_image(label: int, number: int) -> Image.Image:
    """Tells its class by its colour."""
    pixels = np.random.default_rng(100 * label + number).integers(0, 60, (14, 18, 3))
    pixels[..., label % 3] += 60 * (1 + label // 3)
    return Image.fromarray(pixels.astype(np.uint8))


def save_vtab(root: Path, *, classes: int = 3, train: int = 8, val: int = 4, test: int = 6) -> Path:
    """A task folder in the layout of 6.1.4."""
    lists: dict[str, list[str]] = {}
    for split, count in (("train800", train), ("val200", val), ("test", test)):
        (root / "images" / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            make_image(i % classes, i).save(root / "images" / split / f"{i:06d}.png")
            lists.setdefault(split, []).append(f"images/{split}/{i:06d}.png {i % classes}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def task(data: Path | str | None, model: Any = None, **settings: Any) -> VTAB:
    given = {name: settings.pop(name) for name in ("train", "labels", "seed") if name in settings}
    config = VTABConfig(**settings)
    return VTAB(TaskInputs(model=model or tiny(), data=data and str(data), **given), config)


def balanced(found: VTAB) -> dict[str, Any]:
    """The report, checked: counts in equal counts out plus everything left out, by name."""
    report = found.data_report()
    left_out = ["train_skipped", "held_out_skipped", "lines_skipped", "train_skipped_also_held_out", "not_used"]
    left_out += [name for name in report if name.startswith("files_skipped")]
    assert report["read"] == report["train"] + report["held_out"] + sum(report.get(name, 0) for name in left_out)
    assert report["train"] == len(found.train_stream) == len(found.train_examples)
    assert report["held_out"] == len(found.held_out_stream) == len(found.held_out_examples)
    return report


def save_classes(
    root: Path, count: int = 20, names: tuple[str, ...] = ("cat", "dog"), *, first: int = 0, start: int = 0
) -> Path:
    """One folder per class, drawn as the classes from ``first``; images from number ``start``."""
    for label, name in enumerate(names, start=first):
        (root / name).mkdir(parents=True)
        for i in range(count):
            make_image(label, start + i).save(root / name / f"{i}.png")
    return root


def task_pixels(image: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """Aspect ratio not kept, nothing cropped."""
    return torch.from_numpy(np.array(image.convert("RGB").resize((16, 16), resample))).permute(2, 0, 1)
