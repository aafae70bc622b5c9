"""The images that the demo's vision models are adapted to: three tasks in the format of VTAB-1k, and one for CLIP.

Apart from the digits, which are real, everything is a pure function of a seed. A image is 32 x 32 RGB. Pretraining
(:mod:`zinit.demo.scenes`) uses none of these kinds of images.

``python -m zinit.demo.images --output DIR`` writes the three tasks in the file layout of VTAB-1k.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from zinit.demo import scenes as s
from zinit.errors import ConfigError
from zinit.registry import did_you_mean

Labelled = list[tuple[Image.Image, int]]

SEED = 0


def _smooth(rng: Generator, cells: int) -> s.Plane:
    """Smooth noise in [0, 1] with about ``cells`` x ``cells`` hills and hollows."""
    grid = Image.fromarray(rng.random((cells + 2, cells + 2)).astype(np.float32))
    return np.clip(np.asarray(grid.resize((s.SIZE, s.SIZE), Image.Resampling.BICUBIC)), 0, 1)


def _near(rng: Generator) -> s.Colours:
    """The pixels' distances to random points, in pixels, nearest first: (points, 32, 32)."""
    points = rng.uniform(-4, s.SIZE + 4, (int(rng.integers(14, 30)), 2, 1, 1)).astype(np.float32)
    return np.sort(np.hypot(s.COLUMN - points[:, 0], s.ROW - points[:, 1]), axis=0)


def _bricks(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (5, 9))
    row = np.floor(2 * v)
    return np.maximum((2 * v) % 1 < 0.25, (u + row / 2) % 1 < 0.15).astype(np.float32)


def _chevrons(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (5, 9))
    return s.steps(v + np.abs(u % 1 - 0.5))


def _clouds(rng: Generator) -> s.Plane:
    cells = int(rng.integers(3, 6))
    return np.clip(2 * (0.6 * _smooth(rng, cells) + 0.4 * _smooth(rng, 2 * cells)) - 0.5, 0, 1)


def _marble(rng: Generator) -> s.Plane:
    u, _ = s.field(rng, (7, 12))
    return s.steps(u + 1.5 * _smooth(rng, int(rng.integers(3, 6)))) ** 2


def _mesh(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (4, 7))
    return np.maximum(u % 1 < 0.25, v % 1 < 0.25).astype(np.float32)


def _rays(rng: Generator) -> s.Plane:
    x, y = rng.uniform(4, s.SIZE - 4, 2)
    return s.steps(np.arctan2(s.ROW - y, s.COLUMN - x) * int(rng.integers(6, 12)) / s.TURN + rng.random())


def _ripples(rng: Generator) -> s.Plane:
    x, y = rng.uniform(0, s.SIZE, 2)
    return s.steps(np.hypot(s.COLUMN - x, s.ROW - y) / rng.uniform(4, 7) + rng.random())


def _scales(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (6, 10))
    row = np.floor(2 * v)
    return np.hypot((u + row / 2) % 1 - 0.5, (2 * v) % 1 / 2).astype(np.float32).clip(0.2, 0.6) * 2.5 - 0.5


def _waves(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (8, 12))
    return s.steps(2 * v + 0.4 * np.sin(s.TURN * u))


def _weave(rng: Generator) -> s.Plane:
    u, v = s.field(rng, (7, 11))
    over = (np.floor(2 * u) + np.floor(2 * v)) % 2
    return np.where(over, np.abs((2 * u) % 1 - 0.5), np.abs((2 * v) % 1 - 0.5)).astype(np.float32) * 2


TEXTURES: dict[str, Callable[[Generator], s.Plane]] = {
    "bricks": _bricks,
    "cells": lambda rng: np.clip(_near(rng)[0] / 5, 0, 1),
    "chevrons": _chevrons,
    "clouds": _clouds,
    "cracks": lambda rng: (np.diff(_near(rng)[:2], axis=0)[0] < 1.1).astype(np.float32),
    "marble": _marble,
    "mesh": _mesh,
    "rays": _rays,
    "ripples": _ripples,
    "scales": _scales,
    "waves": _waves,
    "weave": _weave,
}
NEW_SHAPES: dict[str, s.Shape] = {
    "flower": s.petals(6, 0.45),
    "moon": lambda u, v: np.maximum(s.disc(u, v), -s.disc(u, v, 0.5, 0, 0.75)),
    "drop": lambda u, v: np.hypot(u * (1.5 + 0.9 * -v), v) - 0.95,
    "dome": lambda u, v: np.maximum(s.disc(u, v, 0, 0.4, 1), v - 0.4),
    "diamond": lambda u, v: np.abs(u) * 1.6 + np.abs(v) - 1,
}
MOST = 6
"""The highest number of objects in :func:`counts`."""


def _shuffled(images: list[s.Pixels], labels: list[int], rng: Generator) -> Labelled:
    return [(Image.fromarray(images[i]), labels[i]) for i in rng.permutation(len(images))]


def digits(seed: int = SEED) -> tuple[list[str], Labelled]:
    """The 1,797 handwritten digits that come with scikit-learn, enlarged from 8 x 8, in random order."""
    from sklearn.datasets import load_digits

    values, labels = map(np.asarray, load_digits(return_X_y=True))
    small = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = s.stream("digits", seed).permutation(len(small))
    large = [Image.fromarray(small[i]).resize((s.SIZE, s.SIZE), Image.Resampling.BICUBIC).convert("RGB") for i in order]
    return [str(digit) for digit in range(10)], [(image, int(labels[i])) for image, i in zip(large, order, strict=True)]


def textures(seed: int = SEED, total: int = 1800) -> tuple[list[str], Labelled]:
    """Textures of kinds that no scene has, as many of each, in random order: (names, (image, label) pairs)."""
    rng = s.stream("textures", seed)
    labels = [i % len(TEXTURES) for i in range(total)]
    makers = list(TEXTURES.values())
    images: list[s.Pixels] = []
    for label in labels:
        first = rng.random(3).astype(np.float32)
        image = s.mix(np.broadcast_to(first, (s.SIZE, s.SIZE, 3)), s.unlike(first, rng, 0.4), makers[label](rng))
        images.append(s.finish(image, rng, 0.2))
    return list(TEXTURES), _shuffled(images, labels, rng)


def counts(seed: int = SEED, total: int = 1800) -> tuple[list[str], Labelled]:
    """One to six objects of mixed kinds that no scene has, on textures: (names, (image, label) pairs)."""
    rng = s.stream("counts", seed)
    labels = [i % MOST for i in range(total)]
    images: list[s.Pixels] = []
    for label in labels:
        ground = rng.random(3).astype(np.float32)
        texture = TEXTURES[s.pick(rng, ("clouds", "marble", "ripples", "waves"))](rng)
        image = s.mix(np.broadcast_to(ground, (s.SIZE, s.SIZE, 3)), s.tint(ground, rng, 0.1), texture)
        colour = s.unlike(ground, rng, 0.9)
        for x, y, radius in s.places(label + 1, (3.5, 5.5), rng, gap=1.5):
            shape = NEW_SHAPES[s.pick(rng, tuple(NEW_SHAPES))]
            cover = s.cover(shape(*s.local(x, y, radius, rng, turn=1)), radius)
            image = s.mix(image, s.tint(colour, rng, 0.08), cover)
        images.append(s.finish(image, rng))
    return [str(number + 1) for number in range(MOST)], _shuffled(images, labels, rng)


DRAWN_COLOURS = ("black", "blue", "brown", "cyan", "green", "orange", "pink", "purple", "red", "yellow")
DRAWN_SHAPES = ("circle", "ring")
DRAWN_PER_CLASS = {"train": 24, "test": 40}


def drawings(seed: int = SEED) -> tuple[list[str], dict[str, Labelled]]:
    """Pale shapes with a dark outline on squared paper; see :func:`zinit.demo.base_to_novel`."""
    rng = s.stream("drawings", seed)
    kinds = sorted((colour, shape) for colour in DRAWN_COLOURS for shape in DRAWN_SHAPES)
    names = [f"{colour} {shape}" for colour, shape in kinds]
    splits: dict[str, Labelled] = {}
    for split, number in DRAWN_PER_CLASS.items():
        labels = [label for label in range(len(names)) for _ in range(number)]
        splits[split] = _shuffled([_drawing(*kinds[label], rng) for label in labels], labels, rng)
    return names, splits


def _drawing(colour: str, shape: str, rng: Generator) -> s.Pixels:
    pale = s.tint(s.COLOURS[colour], rng, 0.08) * np.float32(0.65) + np.float32(0.3)
    paper = np.broadcast_to(s.tint((0.9, 0.87, 0.8), rng), (s.SIZE, s.SIZE, 3))
    image = s.mix(paper, s.tint((0.6, 0.7, 0.75), rng), 0.6 * _mesh(rng))
    for x, y, radius in s.places(1, (8, 13), rng):
        distance = s.SHAPES[shape](*s.local(x, y, radius, rng))
        image = s.mix(image, pale, 0.6 * s.cover(distance, radius))
        image = s.mix(image, pale * np.float32(0.5), s.cover(np.abs(distance) - 0.5 / radius, radius))
    return s.finish(image, rng, 0.15)


DATASETS: dict[str, Callable[[], tuple[list[str], Labelled]]] = {
    "digits": digits,
    "textures": textures,
    "counts": counts,
}


def task(dataset: str) -> tuple[list[str], dict[str, Labelled]]:
    """One of `DATASETS` in the splits of VTAB-1k; see :func:`zinit.demo.labelled_images`."""
    if dataset not in DATASETS:
        raise ConfigError(f"the demo has no images called {dataset!r}.{did_you_mean(dataset, DATASETS)}")
    names, pairs = DATASETS[dataset]()
    return names, {"train800": pairs[:800], "val200": pairs[800:1000], "test": pairs[1000:]}


def write_vtab(output: Path, dataset: str) -> None:
    """Writes a task in the layout of VTAB-1k's dumps: images by split, and a list of each split."""
    _, splits = task(dataset)
    splits["train800val200"] = splits["train800"] + splits["val200"]
    for split, pairs in splits.items():
        folder = output / dataset / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        for number, (image, label) in enumerate(pairs):
            image.save(folder / f"{number:06}.png")
            lines.append(f"images/{split}/{number:06}.png {label}\n")
        (output / dataset / f"{split}.txt").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's three image tasks in the layout of VTAB-1k.")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets one folder for each task")
    output: Path = parser.parse_args().output
    for dataset in DATASETS:
        write_vtab(output, dataset)
        print(output / dataset)


if __name__ == "__main__":
    main()
