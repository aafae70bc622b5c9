"""What tests of the benchmark and of the search share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import zinit  # noqa: F401 - the fixture


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `fake_zinit` writes what it was started with."""
    monkeypatch.setenv("FAKE_JOURNAL", str(tmp_path / "journal"))
    return tmp_path / "journal"
