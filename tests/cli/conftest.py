from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import save_records, save_tiny_llama
from zinit import cli


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Zinit = Callable[..., Outcome]


@pytest.fixture
def zinit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Zinit:
    """Runs the command line in this process, exactly as its entry point does."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["zinit", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_records(tmp_path_factory.mktemp("data") / "data.json")


QUICK = ("-o", "prefix.length=3", "-o", "steps=4", "-o", "batch_size=8", "-o", "task.max_new_tokens=6",
         "-o", "task.evaluation_limit=2", "-o", "learning_rate=0.02", "-o", "warmup_steps=0")  # fmt: skip


@pytest.fixture(scope="session")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a short finished run. Treat it as read-only."""
    from zinit.runs.settings import resolve
    from zinit.runs.train import train_run

    output = tmp_path_factory.mktemp("finished") / "run"
    config, preset = resolve(backbone="llama", model=str(model), data=str(data), options=QUICK[1::2])
    train_run(config, output, preset=preset)
    return output
