"""Faults from outside, each injected: a full disk, a read-only folder, vanished data, a process that dies."""

from __future__ import annotations

import errno
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.tiny import save_records, save_tiny_llama
from tests.train.test_crash import run, steps
from zinit.errors import CheckpointError, DataError, ZinitError
from zinit.runs.config import RunConfig
from zinit.runs.directory import Log
from zinit.runs.settings import resolve
from zinit.runs.train import train_run
from zinit.train.events import Event, Notice, Step, read_log
from zinit.ui import console

OPTIONS = ["steps=8", "batch_size=4", "micro_batch_size=2", "save_every=2", "evaluate_every=0", "warmup_steps=2",
           "task.evaluation_limit=0", "learning_rate=0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model")
    save_records(folder / "data.json", 40)
    return folder


def settings(folder: Path) -> RunConfig:
    model, data = str(folder / "model"), str(folder / "data.json")
    return resolve(backbone="llama", model=model, data=data, options=OPTIONS)[0]


@pytest.fixture(scope="module")
def quiet_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quiet") / "run"
    train_run(settings(folder), output)
    return output


def assert_same_adapter(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@contextmanager
def disk_full_above(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the system itself refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_loses_nothing(folder: Path, quiet_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    message = r"checkpoint of step 2 cannot be written .*resume.*Make room"
    with pytest.raises(CheckpointError, match=message), disk_full_above(10_000):
        train_run(settings(folder), output)
    assert list(output.rglob("*building*")) == []
    train_run(settings(folder), output, resume=True)
    assert_same_adapter(output, quiet_run)


def test_a_full_disk_at_the_end_of_the_run(
    folder: Path, quiet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter itself cannot be written: the run is not finished, and --resume writes it."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("zinit.adapter.file.write_atomically", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*--resume --output"):
            train_run(settings(folder), output)
    assert not (output / "adapter.json").exists()
    train_run(settings(folder), output, resume=True)
    assert_same_adapter(output, quiet_run)


def test_no_room_for_the_record(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to resume, so no message says so; the same command works."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("zinit.runs.directory.write_atomically", full)
        with pytest.raises(CheckpointError, match=r"run.json .*No space left.* Make room, then run the same command"):
            train_run(settings(folder), output)
    assert not output.exists()
    assert train_run(settings(folder), output)["steps"] == 8


def test_a_log_that_cannot_be_written_ends_no_training(
    folder: Path, quiet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, told, append = tmp_path / "run", list[Event](), Log._append

    def no_room_for_a_while(self: Log, line: bytes) -> None:
        step = json.loads(line).get("step", 0)
        if 3 <= step < 7:
            append(self, line[:10])  # what still went in
            full()
        append(self, line)

    monkeypatch.setattr(Log, "_append", no_room_for_a_while)
    train_run(settings(folder), output, on_event=told.append)
    assert_same_adapter(output, quiet_run)
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert notices == [f"{output / 'log.jsonl'} cannot be written: No space left on device. The run goes on without "
                       f"these lines"]  # fmt: skip
    log = read_log(output / "log.jsonl")
    assert [event.step for event in log.of(Step)] == [1, 2, 7, 8], "each line stands alone again"
    assert [event.step for event in told if isinstance(event, Step)] == list(range(1, 9))


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_becomes_read_only(
    folder: Path, quiet_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system that is mounted read-only after an error of the disk. (Modes do not bind root.)"""
    output, opened = tmp_path / "run", Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode[0] != "r" and output in path.parents:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, mode, *args, **kwargs)

    def remount(event: Event) -> None:
        if event.to_dict().get("step") == 5:
            monkeypatch.setattr(Path, "open", read_only)

    with pytest.raises(CheckpointError, match=rf"Read-only file system.*zinit train --resume --output {output}"):
        train_run(settings(folder), output, on_event=remount)
    monkeypatch.undo()
    assert sorted(path.name for path in (output / "resume").iterdir()) == ["step-00000002", "step-00000004"]
    train_run(settings(folder), output, resume=True)
    assert_same_adapter(output, quiet_run)


def test_data_that_vanished_or_changed_before_a_resume(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    data = save_records(tmp_path / "mine.json", 40)
    config = resolve(backbone="llama", model=str(folder / "model"), data=str(data), options=OPTIONS)[0]
    with pytest.raises(CheckpointError), disk_full_above(10_000):
        train_run(config, output)
    before = sorted(output.iterdir())
    kept = data.read_bytes()
    data.unlink()
    with pytest.raises((DataError, ZinitError), match=r"mine\.json"):
        train_run(config, output, resume=True)
    save_records(data, 39)
    with pytest.raises(CheckpointError, match=r"examples was .* when it was saved"):
        train_run(config, output, resume=True)
    assert sorted(output.iterdir()) == before
    data.write_bytes(kept)
    assert train_run(config, output, resume=True)["steps"] == 8


@pytest.mark.integration
def test_a_group_that_torchrun_restarts_goes_on_by_itself(folder: Path, quiet_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    inputs = ["--backbone", "llama", "--model", str(folder / "model"), "--data", str(folder / "data.json")]
    options = [part for option in OPTIONS for part in ("-o", option)]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    arguments = ["-m", "tests.train.dying", "train", *inputs, *options, "--output", str(output)]
    done = processes.run("tests.launch", *launch, *arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4]
    ours, theirs = steps(output), steps(quiet_run)
    assert list(ours) == list(theirs)
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-5 * max(theirs.values())


def test_only_the_launch_that_began_a_run_goes_on_with_it(
    folder: Path, quiet_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another launch's restart must not touch a folder that its first life was refused."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(ZinitError, match="already holds a run"):
        train_run(settings(folder), quiet_run)


def test_one_process_prints_the_error(tmp_path: Path) -> None:
    done = run("train", "--backbone", "llama", "-o", "epochs=-1", "--output", str(tmp_path / "run"), processes=2)
    assert done.stderr.count("epochs must be a number above 0") == 1
    assert "zinit: [train] epochs" in done.stderr


def test_a_process_that_fails_alone_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    console.print_error("its disk is full")
    assert capsys.readouterr().err == "zinit (process 3 of 8): its disk is full\n"
    assert waited == [console.PATIENCE]
