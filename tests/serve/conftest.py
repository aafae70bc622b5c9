"""One engine with adapters of every kind, and what it should answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.world import ALL, TEXTS, folders, limits, models
from zinit.serve.engine import Engine
from zinit.ui.chat import ChatSession


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(models(*ALL), limits()).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], str]:
    """What ``zinit generate`` answers, for the adapters of runs and for the base."""
    found = {}
    for name in ("anna", "bert", "talk", "base"):
        session = ChatSession(folders()["anna" if name == "base" else name], temperature=0, max_new_tokens=24)
        session.base = name == "base"
        found |= {(name, text): session.answer(text, stream=False) for text in TEXTS}
    return found
