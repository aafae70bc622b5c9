"""Images of simple objects and captions of them, on which the demo's vision models were pretrained.

Everything is a pure function of a seed (numpy only). A image is 32 x 32 RGB: one to four equal objects with a shape,
a colour, a pattern and a size, on a background. :func:`caption` puts a scene into words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Plane = NDArray[Any]
"""(32, 32) values, one for each pixel."""
Colours = NDArray[Any]
"""(3,) red, green and blue in [0, 1], or a image of them, (32, 32, 3)."""
Pixels = NDArray[np.uint8]
"""A finished image, (32, 32, 3)."""
Shape = Callable[[Plane, Plane], Plane]
"""The signed distance (below 0 is inside) of points (u, v) to an outline; all in units of the shape's radius."""

SIZE = 32
ROW, COLUMN = (np.mgrid[:SIZE, :SIZE] + 0.5).astype(np.float32)
TURN = 2 * np.pi


def stream(name: str, seed: int) -> Generator:
    """A generator for one purpose; every purpose draws from a stream of its own."""
    return np.random.default_rng([seed, crc32(name.encode())])


# --- shapes ----------------------------------------------------------------------------------------------------------


def disc(u: Plane, v: Plane, x: float = 0, y: float = 0, radius: float = 0.95) -> Plane:
    return np.hypot(u - x, v - y) - np.float32(radius)


def _box(u: Plane, v: Plane, width: float, height: float) -> Plane:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _polygon(sides: int) -> Shape:
    angles = TURN * (np.arange(sides) / sides + 0.25)

    def distance(u: Plane, v: Plane) -> Plane:
        return np.max([u * np.cos(a) + v * np.sin(a) for a in angles], axis=0) - np.cos(np.pi / sides)

    return distance


def petals(number: int, depth: float) -> Shape:
    def distance(u: Plane, v: Plane) -> Plane:
        wave = np.abs((np.arctan2(v, u) * number / TURN) % 1 * 2 - 1)
        return np.hypot(u, v) - (1 - depth * wave)

    return distance


def _stroke(*points: tuple[float, float], width: float = 0.14) -> Shape:
    corners = np.array(points)

    def distance(u: Plane, v: Plane) -> Plane:
        start, along = corners[:-1, :, None, None], np.diff(corners, axis=0)[:, :, None, None]
        across = np.stack([u, v])[None] - start
        position = np.clip((across * along).sum(1) / (along * along).sum(1), 0, 1)
        return np.sqrt(((across - position[:, None] * along) ** 2).sum(1).min(0)) - width

    return distance


def _curve(point: Callable[[float], tuple[float, float]], pieces: int = 10) -> Shape:
    return _stroke(*(point(i / pieces) for i in range(pieces + 1)))


def _around(turns: float, start: float, end: float) -> Callable[[float], tuple[float, float]]:
    """A point that moves around the centre; its distance to it goes from ``start`` to ``end``."""
    return lambda t: tuple((start + (end - start) * t) * f(TURN * turns * t) for f in (np.cos, np.sin))


SHAPES: dict[str, Shape] = {
    "circle": disc,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "hexagon": _polygon(6),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95)),
    "star": petals(5, 0.6),
    "ring": lambda u, v: np.abs(disc(u, v, radius=0.72)) - 0.22,
    "bar": lambda u, v: _box(u, v, 0.95, 0.4),
    "heart": lambda u, v: np.minimum(
        np.minimum(disc(u, v, -0.42, -0.3, 0.5), disc(u, v, 0.42, -0.3, 0.5)),
        np.maximum(np.abs(u) * 0.75 + v * 0.66 - 0.6, -0.35 - v),
    ),
    "line": _stroke((-0.95, 0), (0.95, 0)),
    "arc": _curve(_around(0.5, 0.85, 0.85)),
    "hook": _stroke((-0.3, -0.9), (-0.3, 0.4), (-0.1, 0.75), (0.25, 0.8), (0.55, 0.5), (0.55, 0.25)),
    "wave": _curve(lambda t: (1.9 * t - 0.95, 0.45 * np.sin(TURN * t)), 12),
    "zigzag": _stroke((-0.95, 0.4), (-0.4, -0.5), (0.1, 0.5), (0.5, -0.5), (0.95, 0.4)),
    "spiral": _curve(_around(1.8, 0.95, 0.15), 18),
    "loop": _stroke((0.6, -0.9), (0.1, -0.7), (-0.4, 0), (-0.4, 0.6), (0.1, 0.9), (0.5, 0.6), (0.4, 0.2), (-0.2, 0.2)),
    "corner": _stroke((-0.5, -0.9), (-0.5, 0.7), (0.7, 0.7)),
    "tee": _stroke((-0.8, -0.7), (0.8, -0.7), (0, -0.7), (0, 0.9)),
}
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.1, 0.1),
    "orange": (0.95, 0.5, 0.05),
    "yellow": (0.95, 0.9, 0.15),
    "green": (0.15, 0.65, 0.2),
    "cyan": (0.2, 0.85, 0.9),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.5, 0.15, 0.7),
    "pink": (0.98, 0.55, 0.75),
    "brown": (0.5, 0.3, 0.12),
    "white": (0.97, 0.97, 0.97),
    "grey": (0.5, 0.5, 0.5),
    "black": (0.06, 0.06, 0.06),
}
PATTERNS = ("plain", "striped", "checked", "dotted", "speckled", "shaded")
SIZES: dict[str, tuple[float, float]] = {"small": (4.5, 7), "medium": (7, 10.5), "large": (10.5, 14)}
BACKGROUNDS = ("plain", "faded", "grainy", "lined", "split")
MAX_COUNT = 4


@dataclass(frozen=True)
class Scene:
    """What a image of :func:`scenes` shows: ``count`` equal objects on a background."""

    shape: str
    colour: str
    pattern: str
    size: str
    background: str
    count: int

    def labels(self) -> tuple[int, ...]:
        """The attributes as class numbers, in the order of :data:`ATTRIBUTES`."""
        values = (self.shape, self.colour, self.pattern, self.size, self.background, str(self.count))
        return tuple(names.index(value) for names, value in zip(ATTRIBUTES.values(), values, strict=True))


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "size": tuple(SIZES),
    "background": BACKGROUNDS,
    "count": tuple(str(count) for count in range(1, MAX_COUNT + 1)),
}


def pick(rng: Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def scenes(seed: int, plain: float = 0) -> Iterator[tuple[Scene, Pixels]]:
    """An endless stream of scenes and their images (32, 32, 3).

    Args:
        seed: other seeds give other scenes.
        plain: the fraction of scenes with one object and plain pattern and background.
    """
    rng = stream("scenes", seed)
    while True:
        count = int(rng.integers(1, MAX_COUNT + 1)) if rng.random() < 0.5 else 1
        size = pick(rng, tuple(SIZES)) if count == 1 else "small"
        scene = Scene(
            shape=pick(rng, tuple(SHAPES)),
            colour=pick(rng, tuple(COLOURS)),
            pattern=pick(rng, PATTERNS),
            size=size,
            background=pick(rng, BACKGROUNDS),
            count=count,
        )
        if plain and rng.random() < plain:
            scene = replace(scene, pattern="plain", background="plain", count=1, size=pick(rng, ("medium", "large")))
        yield scene, draw(scene, rng)


def draw(scene: Scene, rng: Generator) -> Pixels:
    """One image of a scene: places, turns, exact colours, patterns' steps and noise are random."""
    main = tint(COLOURS[scene.colour], rng)
    image = _background(scene.background, unlike(main, rng), rng)
    for x, y, radius in places(scene.count, SIZES[scene.size], rng):
        u, v = local(x, y, radius, rng)
        colour = mix(main, _accent(main, rng), _pattern(scene.pattern, rng))
        image = mix(image, colour, cover(SHAPES[scene.shape](u, v), radius))
    return finish(image, rng)


_NUMBERS = ("", "two ", "three ", "four ")
_OPENINGS = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "this is ", "here is ", "we see ")


def caption(scene: Scene, rng: Generator) -> str:
    """The scene in words, such as "a photo of a striped red circle."; any of its attributes may be left out."""
    words = [scene.shape if scene.count == 1 else _plural(scene.shape)]
    if rng.random() < 0.85:
        words.insert(0, scene.colour)
    if scene.pattern != "plain" and rng.random() < 0.6:
        words.insert(0, scene.pattern)
    if rng.random() < 0.25:
        words.insert(0, scene.size)
    if scene.count == 1:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    elif rng.random() < 0.9:
        words.insert(0, _NUMBERS[scene.count - 1].strip())
    behind = f" on a {scene.background} background" if rng.random() < 0.2 else ""
    return f"{pick(rng, _OPENINGS)}{' '.join(words)}{behind}{pick(rng, ('', '.'))}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


# --- parts of images ---------------------------------------------------------------------------------------------


def tint(colour: Sequence[float] | Colours, rng: Generator, spread: float = 0.05) -> Colours:
    return np.clip(np.asarray(colour) + rng.normal(0, spread, 3), 0, 1).astype(np.float32)


def unlike(colour: Colours, rng: Generator, gap: float = 0.5) -> Colours:
    """A random colour, often a grey, that differs from ``colour`` by more than ``gap`` (sum over channels)."""
    while True:
        other = np.full(3, rng.random()) if rng.random() < 0.35 else rng.random(3)
        if np.abs(other - colour).sum() > gap:
            return other.astype(np.float32)


def _accent(colour: Colours, rng: Generator) -> Colours:
    """The second colour of a pattern: the first one, much darker or much lighter."""
    dark = colour.mean() > 0.6 or (colour.mean() > 0.3 and rng.random() < 0.5)
    return colour * np.float32(0.3) if dark else np.float32(0.3) * colour + np.float32(0.7)


def mix(below: Colours, above: Colours, opacity: Plane) -> Colours:
    return below + (above - below) * opacity[..., None]


def cover(distance: Plane, radius: float) -> Plane:
    """How much of each pixel a shape covers."""
    return np.clip(0.5 - distance * radius, 0, 1).astype(np.float32)


def local(x: float, y: float, radius: float, rng: Generator, turn: float = 0.3) -> tuple[Plane, Plane]:
    """The pixels in a shape's own coordinates: moved, turned (sometimes a lot), stretched and sheared."""
    angle = rng.uniform(-np.pi, np.pi) if rng.random() < turn else rng.normal(0, 0.2)
    stretch, shear = rng.uniform(0.85, 1.15), rng.uniform(-0.2, 0.2)
    u, v = turned((COLUMN - x) / radius, (ROW - y) / radius, angle)
    return u * np.float32(stretch) + v * np.float32(shear), v


def turned(u: Plane, v: Plane, angle: float) -> tuple[Plane, Plane]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * u + sine * v, cosine * v - sine * u


def places(count: int, radii: tuple[float, float], rng: Generator, gap: float = 1) -> list[tuple[float, float, float]]:
    """``count`` places (x, y, radius) that do not overlap; if none are found, the radii shrink."""
    shrink = 1.0
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(20 * count):
            radius = shrink * rng.uniform(*radii)
            x, y = rng.uniform(radius, SIZE - radius, 2)
            if all(np.hypot(x - a, y - b) > radius + r + gap for a, b, r in places):
                places.append((x, y, radius))
            if len(places) == count:
                return places
        shrink *= 0.93


def steps(u: Plane) -> Plane:
    """Of a phase in turns: 1 in its first half, 0 in its second, with soft edges."""
    return np.clip(0.5 + 2 * np.sin(TURN * u), 0, 1).astype(np.float32)


def field(rng: Generator, step: tuple[float, float]) -> tuple[Plane, Plane]:
    """The pixels in the coordinates of a pattern that repeats every 1; a repeat is ``step`` pixels wide."""
    u, v = turned(COLUMN, ROW, rng.uniform(-np.pi, np.pi))
    width = np.float32(rng.uniform(*step))
    return u / width + np.float32(rng.random()), v / width + np.float32(rng.random())


def _pattern(name: str, rng: Generator) -> Plane:
    """Where a pattern's second colour is."""
    if name == "plain":
        return np.zeros((SIZE, SIZE), np.float32)
    if name == "speckled":
        return (rng.random((SIZE, SIZE)) < 0.3).astype(np.float32)
    u, v = field(rng, (4, 6))
    if name == "striped":
        return steps(u)
    if name == "checked":
        return np.abs(steps(u / 1.3) - steps(v / 1.3))
    if name == "dotted":
        return np.clip(1.7 - 5 * np.hypot(u % 1 - 0.5, v % 1 - 0.5), 0, 1).astype(np.float32)
    u = u - u.mean()
    return np.clip(0.5 + u / 3, 0, 1).astype(np.float32)


def _background(name: str, colour: Colours, rng: Generator) -> Colours:
    image = np.broadcast_to(colour, (SIZE, SIZE, 3)).astype(np.float32)
    other = tint(colour, rng, 0.18)
    if name == "faded":
        return mix(image, other, ((turned(COLUMN, ROW, rng.uniform(-np.pi, np.pi))[0] + SIZE) / (2 * SIZE)))
    if name == "grainy":
        return image + rng.normal(0, 0.1, (SIZE, SIZE, 1)).astype(np.float32)
    if name == "lined":
        return mix(image, other, steps(field(rng, (3, 8))[0]))
    if name == "split":
        u, _ = turned(COLUMN - SIZE / 2, ROW - SIZE / 2, rng.uniform(-np.pi, np.pi))
        return mix(image, other, cover((u + rng.uniform(-8, 8)) / SIZE, SIZE))
    return image


def finish(image: Colours, rng: Generator, noise: float = 0.03) -> Pixels:
    """Adds light, contrast and noise of a cheap camera, and rounds to whole numbers."""
    image = (image - 0.5) * np.float32(rng.uniform(0.85, 1.1)) + np.float32(0.5 + rng.normal(0, 0.03))
    image = image + rng.normal(0, noise * rng.random(), image.shape).astype(np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
