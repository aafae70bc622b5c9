"""Small folders in ScienceQA's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

SUBJECTS = ("natural science", "social science", "language science")


def problem(number: int, part: str, **changes: Any) -> dict[str, Any]:
    return {
        "question": f"Which is number {number}?",
        "choices": [f"number {(number + place) % 7}" for place in range(2 + number % 3)],
        "answer": number % 2,
        "hint": "" if number % 3 == 0 else f"One  of them is number {number}.",
        "image": "image.png" if number % 2 else None,
        "grade": f"grade{1 + number % 12}",
        "subject": SUBJECTS[number % 3],
        "lecture": "Numbers count.\nThey go on.",
        "solution": f"It is {number}." if number % 4 else "",
        **{"split": part, **changes},
    }


def document(count: int = 12, **changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Problems "0", "1" and so on, and their splits; ``changes`` are of single problems, by "p3"."""
    names = ["train" if number < count // 2 else "test" for number in range(count)]
    problems = {str(n): problem(n, name, **changes.get(f"p{n}", {})) for n, name in enumerate(names)}
    splits = {name: [pid for pid in problems if problems[pid]["split"] == name] for name in ("train", "val", "test")}
    return problems, splits


def save(folder: Path, problems: Any = None, splits: Any = None, *, images: bool = True) -> Path:
    made = document()
    problems, splits = made[0] if problems is None else problems, made[1] if splits is None else splits
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for pid, entry in problems.items() if images else ():
        if entry.get("image"):
            place = folder / "images" / entry["split"] / pid
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (int(pid) * 9 % 256, 40, 90)).save(place / "image.png")
    return folder
