"""Small caption data in each form that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def draw(folder: Path, count: int = 6) -> list[str]:
    """Images ``0.png`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number * 20, 40, 90)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def captions(number: int) -> list[str]:
    return [f"A picture of {number}.", *[f"number {number} in way {way}" for way in range(number % 3)]]


def karpathy(count: int = 6, splits: tuple[str, ...] = ("train", "restval", "val", "test")) -> dict[str, Any]:
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": "pictures",
                "filename": f"{number}.png",
                "split": splits[number % len(splits)],
                "sentences": [{"raw": text, "tokens": text.split()} for text in captions(number)],
            }
            for number in range(count)
        ],
    }


def coco(count: int = 6) -> dict[str, Any]:
    return {
        "images": [{"id": 100 + number, "file_name": f"{number}.png"} for number in range(count)],
        "annotations": [
            {"id": 10 * number + way, "image_id": 100 + number, "caption": text}
            for way in range(3)
            for number in range(count)
            for text in captions(number)[way : way + 1]
        ],
    }


def lines(count: int = 6, **more: Any) -> str:
    return "\n".join(
        json.dumps({"image": f"{number}.png", "captions": captions(number), **more}) for number in range(count)
    )


def table(count: int = 6) -> str:
    rows = [f'{number}.png,"{text}"' for number in range(count) for text in captions(number)]
    return "\n".join(["file_name,text", *rows])
