"""Time of one training step with and without stored outputs of the frozen lower blocks, on a random ViT.

    python -m benchmarks.activation_cache
    python -m benchmarks.activation_cache --width 768 --heads 12 --image 224

Both sides are the engine's own parts: the task's batches, the stored tensors read from their files, the task's forward,
backward, the optimizer's step. They run in one process, interleaved; the figure is the median of the ratios within a
round. Filling (with the trial and the hash of the weights) is paid once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import zinit
from benchmarks.common import interleaved, prepare, ratio, save
from zinit.tasks.base import TaskInputs
from zinit.tasks.vtab.task import VTAB, VTABConfig
from zinit.train.activation_cache import KEY, stored_activations
from zinit.train.config import TrainConfig
from zinit.train.strategy import make_accelerator


def images(folder: Path, count: int, size: int) -> Path:
    """Random images of two classes in their folders."""
    draw = np.random.default_rng(0)
    for number in range(count):
        (folder / f"class_{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class_{number % 2}" / f"{number}.png")
    return folder


def task_of(options: argparse.Namespace, data: Path) -> VTAB:
    """A random ViT with a prefix on its topmost layers, and a head."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=options.image, patch_size=options.patch, embed_dim=options.width, depth=options.layers,
        num_heads=options.heads, num_classes=0,
    )  # fmt: skip
    model.to(options.device, getattr(torch, options.dtype))
    config = zinit.PrefixConfig(length=options.prefix_length, layers=options.adapted, gate_init=0.1)
    handle = zinit.attach(model, config, seed=0)
    return VTAB(TaskInputs(model=model, handle=handle, data=str(data)), VTABConfig()).to(options.device)


def step_of(options: argparse.Namespace, task: VTAB, collate: Any = None) -> Callable[[], None]:
    """A training step on the next examples; with ``collate`` the outputs of the frozen blocks come with it."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    count, position = len(task.train_stream), 0

    def step() -> None:
        nonlocal position
        indices = [(position + i) % count for i in range(options.batch)]
        position += options.batch
        batch = (collate or task.collate)(task.train_stream, indices)
        task({name: tensor.to(options.device) for name, tensor in batch.items()}).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fills the cache, then times steps without and with it."""
    task = task_of(options, images(folder / "data", options.examples, options.image))
    config = TrainConfig(micro_batch_size=options.batch, activation_cache=str(folder / "cache"))
    started = time.perf_counter()
    with stored_activations(task, config, make_accelerator(config), lambda event: None) as collate:
        filling = time.perf_counter() - started
        task.train()
        steps = {"without": step_of(options, task), "with": step_of(options, task, collate)}
        seconds = interleaved(steps, rounds=options.rounds, device=options.device)
    return {
        "with_over_without": round(ratio(seconds, "with", "without"), 4),
        "median_seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "filling_seconds": round(filling, 3),
        "stored_bytes_per_example": collate(task.train_stream, [0])[KEY].nbytes,
        "examples": len(task.train_stream),
    }


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--width", type=int, default=192, help="C")
    options.add_argument("--layers", type=int, default=12, help="N")
    options.add_argument("--heads", type=int, default=3, help="H")
    options.add_argument("--adapted", type=int, default=2, help="L")
    options.add_argument("--prefix-length", type=int, default=10, help="K")
    options.add_argument("--image", type=int, default=224, help="pixels a side")
    options.add_argument("--patch", type=int, default=16)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--examples", type=int, default=64, help="images, a fifth of which is held out")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, float32 on a CPU")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument("--output", type=Path, default=None)
    return options.parse_args()


def main() -> None:
    options = parse()
    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    save("activation_cache", options, figures)


if __name__ == "__main__":
    main()
