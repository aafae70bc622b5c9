"""Experts that say what a test wants, and remember what they were shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from PIL import Image

from zinit.experts import EXPERTS


class Painter:
    """Names the colour of an image's first pixel; says nothing of the darkest."""

    name, line, by_question = "painter", "The colour", False
    shown: ClassVar[list[int]] = []

    def __init__(self, argument: str, *, device: Any = "cpu") -> None:
        self.nothing_below = int(argument or 0)

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[Any]:
        reds = [image.getpixel((0, 0))[0] for image in images]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        Painter.shown += reds
        return [f"red\n {red}" if red >= self.nothing_below else "" for red in reds]


class Repeater:
    """Says the question, many times."""

    name, line, by_question = "repeater", "It was asked", True

    def __init__(self, argument: str, *, device: Any = "cpu") -> None:
        pass

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[str]:
        return [" ".join([question] * 20) for question in questions]


class Broken(Painter):
    name = "broken"

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> list[Any]:
        if self.nothing_below:
            return [None] * len(images)
        raise RuntimeError("the index is gone\nand more")


@contextmanager
def registered() -> Iterator[None]:
    """The experts above have names while inside."""
    for kind in (Painter, Repeater, Broken):
        EXPERTS.register(kind.name, f"tests.experts.stubs:{kind.__name__}")
    try:
        yield
    finally:
        for kind in (Painter, Repeater, Broken):
            del EXPERTS._where[kind.name]


def find(image: Image.Image, question: str) -> str:
    """For the expert search."""
    return f"{question} {image.size}"
