"""Whatever write a kill or Ctrl-C falls into, the command that a message gives goes on with the folder that is left."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Outcome, Zinit
from zinit.files import is_ours
from zinit.runs.directory import Log

Strike = Callable[[int | None], None]
"""What happens at a write, of which a descriptor may be open."""

OPTIONS = ("-o", "prefix.length=3", "-o", "steps=2", "-o", "batch_size=4", "-o", "task.evaluation_limit=0",
           "-o", "learning_rate=0.02", "-o", "warmup_steps=0", "-o", "save_every=1")  # fmt: skip


def at_write(patch: pytest.MonkeyPatch, number: int, strike: Strike) -> list[int]:
    """Makes something happen at the given write of this process, counted from 0. Returns the count, kept up to date."""
    count = [0]
    fsync, replace, append = os.fsync, os.replace, Log._append

    def due() -> bool:
        count[0] += 1
        return count[0] == number + 1

    def synchronise(descriptor: int) -> None:
        if due():
            strike(descriptor)
        fsync(descriptor)

    def rename(*arguments: Any) -> None:
        if due():
            strike(None)
        replace(*arguments)

    def log(self: Log, line: bytes) -> None:
        if due():
            append(self, line[: len(line) // 2])
            strike(None)
        append(self, line)

    patch.setattr(os, "fsync", synchronise)
    patch.setattr(os, "replace", rename)
    patch.setattr(Log, "_append", log)
    return count


def kill(descriptor: int | None) -> None:
    """As SIGKILL, or a power cut: of the file that is open, half is there."""
    if descriptor is not None:
        with suppress(OSError):  # a folder
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(descriptor: int | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def plain_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take most of the time of a run this small."""
    monkeypatch.setattr("zinit.runs.report._curves", lambda *_: "")
    monkeypatch.setattr("zinit.runs.report._gates", lambda *_: "")


@pytest.fixture
def command(model: Path, data: Path) -> tuple[str, ...]:
    return ("train", "--backbone", "llama", "--model", str(model), "--data", str(data), *OPTIONS)


@pytest.fixture
def quiet(command: tuple[str, ...], zinit: Zinit, tmp_path: Path) -> tuple[int, Path]:
    """How many writes a run makes, and the folder of a run that nothing befell."""
    with pytest.MonkeyPatch.context() as patch:
        count = at_write(patch, -1, interrupt)
        done = zinit(*command, "--output", tmp_path / "quiet")
    assert done.code == 0, done.err
    return count[0], tmp_path / "quiet"


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (found, expected))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    assert {path.name for path in (found / "resume").iterdir()} == {"step-00000001", "step-00000002"}


def follow(zinit: Zinit, output: Path, started: tuple[str, ...]) -> Outcome:
    """Goes on with what a kill left: exactly one of the two commands works, and the other one's message says which."""
    resumed = ("train", "--resume", "--output", str(output))
    is_run = (output / "run.json").exists()
    refused = zinit(*(started if is_run else resumed))
    assert refused.code == 2, refused.err
    advice = f"zinit {shlex.join(resumed)}" if is_run else "without --resume"
    assert advice in refused.err
    return zinit(*(resumed if is_run else started))


@pytest.mark.slow
def test_a_kill_at_any_write(
    command: tuple[str, ...], quiet: tuple[int, Path], zinit: Zinit, tmp_path: Path
) -> None:  # fmt: skip
    writes, expected = quiet
    assert writes > 25
    for number in range(writes):
        output = tmp_path / f"killed at {number}"  # a blank: commands are to be pasted
        started = (*command, "--output", str(output))
        child = os.fork()
        if not child:
            with pytest.MonkeyPatch.context() as patch:
                at_write(patch, number, kill)
                patch.setattr(sys, "argv", ["zinit", *started])
                zinit(*started)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        done = follow(zinit, output, started)
        assert done.code == 0, (number, done.err)
        assert_same(output, expected)
        assert not any(is_ours(path.name) for path in output.rglob(".*"))


@pytest.mark.slow
def test_ctrl_c_at_any_write(
    command: tuple[str, ...], quiet: tuple[int, Path], zinit: Zinit, tmp_path: Path
) -> None:  # fmt: skip
    writes, expected = quiet
    for number in range(writes):
        output = tmp_path / f"stopped at {number}"
        started = (*command, "--output", str(output))
        with pytest.MonkeyPatch.context() as patch:
            at_write(patch, number, interrupt)
            stopped = zinit(*started)
        assert stopped.code == 130
        advised = [line.partition(": ")[2] for line in stopped.err.splitlines() if line.startswith("Go on with: ")]
        assert advised or "nothing was written" in stopped.err
        assert bool(advised) == output.exists()
        done = zinit(*(shlex.split(advised[0])[1:] if advised else started))
        assert done.code == 0, (number, done.err)
        assert_same(output, expected)
