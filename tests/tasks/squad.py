"""Small SQuAD documents and tasks on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.shared import SHARED
from tests.tasks.encoder import encoder_tokenizer, tiny_encoder
from zinit.tasks.base import TaskInputs
from zinit.tasks.squad.task import Squad, SquadConfig

DATA = SHARED / "data"
NAMES = ("Ada", "Björn", "Chen 陈", "Dora", "Émile", "Faye")


def document(count: int = 12, *, unanswerable: bool = True) -> dict[str, Any]:
    """Official JSON: one paragraph per number, each with one question or two."""
    paragraphs = []
    for i in range(count):
        name = NAMES[i % 6]
        context = (
            f"It rained{' a lot' * (i % 4)}. {name}  lives in house {i}. The street is quiet{' at night' * (i % 3)}."
        )
        answer = {"text": f"house {i}", "answer_start": context.index(f"house {i}")}
        qas = [{"id": f"q{i}", "question": f"Where does {name} live?", "answers": [answer], "is_impossible": False}]
        if unanswerable and i % 2:
            qas.append({"id": f"n{i}", "question": "Who is the king?", "answers": [], "is_impossible": True})
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "v2.0", "data": [{"title": "Street", "paragraphs": paragraphs}]}


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def make(folder: Path, content: Any = None, kind: str = "roberta", tokenizer: Any = None, **settings: Any) -> Squad:
    config = SquadConfig(**{"max_length": 96, "stride": 16, "max_question": 32, **settings})
    data = write(folder / "data.json", document() if content is None else content)
    return Squad(
        TaskInputs(model=tiny_encoder(kind), processor=tokenizer or encoder_tokenizer(kind), data=data), config
    )
