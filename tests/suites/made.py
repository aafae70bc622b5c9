"""Suites of a few questions, in the layouts of their authors."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def mme(folder: Path, subtasks: Sequence[str] = ("existence", "OCR"), images: int = 2) -> Path:
    """The first subtask keeps its files in two folders, the others in one. Every image has one yes and one no."""
    for place, subtask in enumerate(subtasks):
        pictures, texts = ("", "") if place else ("images", "questions_answers_YN")
        for number in range(images):
            draw(folder / subtask / pictures / f"{number}.png", 10 * place + number)
            text = folder / subtask / texts / f"{number}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text(f"Is it {number}? Please answer yes or no.\tYes\nIs it {number + 1}?\tNo\n")
    return folder


def encoded(shade: int = 0) -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# Question 5 in four rotations, the image once; question 6 has two options.
ROWS = [
    (5, "What is it?", "cat", "dog", "cow", "hen", "B", "animals", "FP-S", "Look."),
    (1000005, "What is it?", "dog", "cow", "hen", "cat", "A", "animals", "FP-S", "Look."),
    (2000005, "What is it?", "cow", "hen", "cat", "dog", "D", "animals", "FP-S", "Look."),
    (3000005, "What is it?", "hen", "cat", "dog", "cow", "C", "animals", "FP-S", "Look."),
    (6, "Is it red?", "yes", "no", "", "", "A", "colours", "CP", ""),
    (1000006, "Is it red?", "no", "yes", "", "", "B", "colours", "CP", ""),
]


def mmbench(file: Path, rows: Sequence[tuple[object, ...]] = ROWS, *, answers: bool = True) -> Path:
    header = ["index", "question", "A", "B", "C", "D", "answer", "category", "l2-category", "hint", "image"]
    lines = ["\t".join(header)]
    for row in rows:
        index = int(str(row[0]))
        first = index % 1_000_000
        cells = [*map(str, row), str(first) if index > first in {row[0] for row in rows} else encoded(first)]
        cells[6] = cells[6] if answers else ""
        lines.append("\t".join(cells))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def pope(folder: Path) -> Path:
    for kind in ("random", "popular"):
        draw(folder / "val2014" / "a.png")
        records = [
            {"question_id": n, "image": "a.png", "text": f"Is there a {n}?", "label": "yes" if n % 2 else "no"}
            for n in (1, 2, 3, 4)
        ]
        (folder / f"coco_pope_{kind}.json").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder
