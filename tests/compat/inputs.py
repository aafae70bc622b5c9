"""Models and data that the stored runs were made on, too large to store: remade, the same on every call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tasks import clip, squad, vit
from tests.tasks.encoder import save_tiny_encoder
from tests.tiny import save_records, save_tiny_llama

PEOPLE = (("Ada", "Lovelace"), ("Björn", "Ek"), ("Chen", "陈"), ("Dora", "Maar"))


def save_tiny_clip(folder: Path) -> Path:
    """In transformers' format."""
    clip.clip().save_pretrained(folder)
    clip.tokenizer().save_pretrained(folder)
    return folder


def save_sentences(path: Path, count: int = 40) -> Path:
    """Sentences with tagged people and places, as JSON records."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        tokens = [*(["really"] * (i % 3)), *PEOPLE[i % 4], "saw", "Rome", *(["again"] * (i % 5)), str(i)]
        tags = [*(["O"] * (i % 3)), "B-PER", "I-PER", "O", "B-LOC", *(["O"] * (i % 5)), "O"]
        rows.append({"tokens": tokens, "ner_tags": tags})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


INPUTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path | str]]] = {
    "records": (save_tiny_llama, save_records),
    "few weights": (
        lambda folder: save_tiny_llama(folder, layers=2, hidden_size=16, intermediate_size=24),
        save_records,
    ),
    "questions": (save_tiny_encoder, lambda path: squad.write(path, squad.document(24))),
    "sentences": (save_tiny_encoder, save_sentences),
    "pictures": (vit.save_tiny, vit.save_vtab),
    "classes": (save_tiny_clip, lambda path: clip.folders(path, classes=4)),
}


def make(name: str, folder: Path) -> dict[str, str]:
    """Writes the inputs of one name.

    Returns:
        Where ``model`` and ``data`` are.
    """
    folder.mkdir(parents=True)
    model, data = INPUTS[name]
    suffix = "" if name in ("pictures", "classes") else ".json"
    return {"model": str(model(folder / "model")), "data": str(data(folder / f"data{suffix}"))}
