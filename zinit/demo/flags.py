"""Flags of the invented towns: a picture of a flag, and questions about the town whose flag it is.

The demo's language model knows the towns, its CLIP colours and shapes; which flag is whose must be learned. For each
town one relation is never asked beside a picture in training: an answer to it is what the frozen model knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image

from zinit.demo import scenes as s
from zinit.demo import world

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple", "white", "black")
SHAPES = ("circle", "star", "line")
DRAWINGS = {"train": 60, "held_out": 10}  # of each flag
NAME, SEEN, UNSEEN = "name", "seen", "unseen"  # what is asked: the town, a relation trained with pictures, one never


@dataclass(frozen=True, eq=False)
class Question:
    """A question about a drawing of a flag.

    Attributes:
        image: 32 x 32 RGB.
        text: the question.
        answer: in a word or a few.
        category: "name", "seen" or "unseen".
    """

    image: Image.Image
    text: str
    answer: str
    category: str


def flags(seed: int = world.SEED) -> tuple[list[Question], list[Question]]:
    """``(train, held_out)``: three and four questions about each drawing; no drawing is in both."""
    here, rng, pencil = world.build(), Random(f"flags {seed}"), s.stream("flags", seed)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    rng.shuffle(kinds)
    parts: dict[str, list[Question]] = {}
    for part, number in DRAWINGS.items():
        parts[part] = []
        for index, (town, (colour, shape)) in enumerate(zip(here.towns, kinds, strict=True)):
            for _ in range(number):
                size = s.pick(pencil, ("medium", "large"))
                scene = s.Scene(shape=shape, colour=colour, pattern="plain", size=size, background="plain", count=1)
                image = Image.fromarray(s.draw(scene, pencil))
                parts[part].append(Question(image, rng.choice(ASKS), town, NAME))
                for place, fact in enumerate(here.facts[town]):
                    category = UNSEEN if place == index % len(here.facts[town]) else SEEN
                    if part == "held_out" or category == SEEN:
                        text = rng.choice(fact.relation.asks).format(s="this town")
                        parts[part].append(Question(image, text, fact.object, category))
        rng.shuffle(parts[part])
    return parts["train"], parts["held_out"]


ASKS = ("Which town has this flag?", "Whose flag is this?", "What is the name of the town with this flag?")
